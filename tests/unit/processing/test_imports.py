import subprocess
import sys


def test_processing_needs_neither_torch_nor_transformers():
    code = (
        "import sys, m4train.processing as p\n"
        "p.Idefics3ImageProcessor()\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
