"""What the image processors share: settings and their files, normalisation, padding to a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from m4train.hub import HUB_OPTIONS, PROCESSOR_FILES, WITHOUT_MEANING, model_folder, refuse_upload
from m4train.json_files import AsJson, read_mapping
from m4train.processing.features import Features
from m4train.processing.files import read_processor_files, write_json
from m4train.processing.images import fused_pixel_table, normalize_into, pixel_table, to_rgb
from m4train.processing.inputs import is_fractions, nest_images, read_image
from m4train.processing.levels import is_deep
from m4train.processing.pieces import Frames
from m4train.processing.resampling import Canvas, canvas, normalize_by_torch, resolved
from m4train.processing.settings import WrongSize, in_documented_order, known_alone, no_setting, warn_of_unused

Self = TypeVar("Self", bound="ImageProcessor")
_MARKS = ("image_processor_type", "processor_class")  # in files, written again by every save
_OWN = ("upstream_reading", "backend")  # settings of ours alone
_BACKEND = "image_backend"  # what files call it: to transformers `backend` is a name that nothing may be set to


class ImageProcessor(AsJson):
    """Base of the image processors. Attributes are the settings of preprocessor_config.json, and may be changed.

    `upstream_reading` reads images as transformers does, for exact comparison: Pillow images are not rotated as their EXIF
    data say, files lose their alpha channel instead of being laid on white, and more than 8 bits are cut off at 255 instead
    of being scaled. `backend` says what resizes: "pil" or "torch", whose pixels are those of transformers' Pillow and
    torchvision backends; "auto" is torch if it can; None, if nobody has said it yet, is Pillow.

    Images are computed on in 256 levels. So an array of fractions that are not multiples of 1/255 loses what is
    between two levels, as it does in transformers wherever that resizes; transformers keeps it with do_resize=False,
    and until what is transparent is laid on white.
    """

    documented_order: ClassVar[tuple[str, ...]] = ()  # of the arguments of `preprocess` after the images
    model_input_names: ClassVar[list[str]] = ["pixel_values", "pixel_attention_mask"]  # what it makes

    def __init__(
        self,
        do_convert_rgb: bool,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        extra: dict[str, Any],
    ) -> None:
        self.do_convert_rgb = do_convert_rgb
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel(image_mean)
        self.image_std = _per_channel(image_std)
        self.upstream_reading = bool(extra.get("upstream_reading", False))
        self.backend = resolved(extra.get("backend"), self.resample)
        self._extra: dict[str, Any] = {}  # of preprocessor_config.json, kept for whoever knows them
        for name in extra:
            if name not in self.setting_names():
                raise no_setting(type(self).__name__, name, self.setting_names())

    # Files

    @classmethod
    def setting_names(cls) -> list[str]:
        """The names of the settings that the constructor takes."""
        kinds = inspect.signature(cls).parameters.values()
        return [kind.name for kind in kinds if kind.kind is not kind.VAR_KEYWORD] + list(_OWN)

    @classmethod
    def from_dict(cls: type[Self], settings: dict[str, Any]) -> Self:
        """The image processor of what a file holds; settings that it does not know are kept, and warned about."""
        processor = cls._of(settings)
        warn_of_unused(cls.__name__, processor._extra)
        return processor

    @classmethod
    def _of(cls: type[Self], settings: dict[str, Any]) -> Self:
        known = cls.setting_names()
        if settings.get(_BACKEND) is not None:
            settings = {"backend": settings[_BACKEND], **settings}
        processor = cls(**{name: value for name, value in settings.items() if name in known and value is not None})
        processor._extra = {name: value for name, value in settings.items() if name not in (*known, *_MARKS, _BACKEND)}
        return processor

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """Reads preprocessor_config.json, or the image part of processor_config.json; `settings` override it, or are
        HUB_OPTIONS. Raises TypeError for a setting there is not.
        """
        hub = {option: settings.pop(option) for option in HUB_OPTIONS if option in settings}
        settings = {name: value for name, value in settings.items() if name not in WITHOUT_MEANING}
        folder = model_folder(pretrained_model_name_or_path, PROCESSOR_FILES, revision, cache_dir, **hub)
        return cls.from_dict(read_processor_files(folder).image_processor).replace(**settings)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> list[str]:
        """Writes preprocessor_config.json, and returns its path."""
        refuse_upload(push_to_hub)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        path = Path(save_directory) / "preprocessor_config.json"
        write_json(path, self.to_dict())
        return [str(path)]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @classmethod
    def from_json_file(cls: type[Self], json_file: str | Path) -> Self:
        """Reads a file of the form of preprocessor_config.json. Raises ConfigError if it cannot be read."""
        return cls.from_dict(read_mapping(Path(json_file)))

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are written to preprocessor_config.json."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        if not settings["upstream_reading"]:
            del settings["upstream_reading"]  # an own setting: other libraries know nothing of it
        backend = settings.pop("backend")
        if backend is not None:
            settings[_BACKEND] = backend
        return self._extra | settings | {"image_processor_type": type(self).__name__}

    def geometry(self) -> dict[str, Any]:
        """The settings that decide how many frames an image becomes, and of what size."""
        names = ("do_resize", "size", "image_size", "max_image_size", "do_image_splitting")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def replace(self: Self, **settings: Any) -> Self:
        """A copy with some settings changed; those given as None stay. Raises TypeError for a setting there is not."""
        for name in settings:
            if name not in self.setting_names():
                raise no_setting(type(self).__name__, name, self.setting_names())
        changes = {name: value for name, value in settings.items() if value is not None}
        return self._of({"backend": self.backend, **self.to_dict(), **changes}) if changes else self

    # Images to frames

    def frames(self, image: Image.Image, size: tuple[int, int] | None = None) -> Frames:
        """The frames (3, H, W) uint8 of an image, in the order of their tokens.

        `size` is the (width, height) of its file if the image was decoded smaller, see `needed_size`.
        """
        raise NotImplementedError

    def needed_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height to which an image of this size is first resized; None if its own pixels are needed."""
        return None

    @property
    def fixed_size(self) -> bool:
        """Whether an image is resized to the same size however large it is."""
        return False

    @property
    def most_detail(self) -> int:
        """How many settings of detail there are: 1 gives the fewest frames, this number those of the settings."""
        return 1

    def natural_detail(self, width: int, height: int) -> int:
        """The most detail for which an image of this size need not be enlarged, apart from rounding up to whole frames."""
        return 1

    def detail_settings(self, detail: int) -> dict[str, Any]:
        """The settings that give a detail below `most_detail`."""
        return {}

    def frame_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """Width and height of each frame that an image of this size becomes."""
        raise NotImplementedError

    def __call__(self, images: Any, *positional: Any, **options: Any) -> Features:
        return self.preprocess(images, *positional, **options)

    @in_documented_order
    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **settings: Any,
    ) -> Features:
        """`pixel_values` (B, N, 3, H, W) float32 and `pixel_attention_mask` (B, N, H, W) int64 of images or lists of images.

        `settings` are arguments of the constructor, for this call. Smaller frames are filled with zeros to the right and
        below, and samples with fewer frames with frames of zeros; the mask is 1 where there is an image. `data_format`
        "channels_last" gives (B, N, H, W, 3); `input_data_format` says which axis of arrays holds the channels.
        """
        processor = self.for_values_of(images, **settings)
        samples = processor.read_samples(images, input_data_format)
        return processor.features(samples, return_tensors, data_format)

    def features(
        self, samples: list[list[Image.Image]], return_tensors: str | None = None, data_format: str | None = None
    ) -> Features:
        """What `preprocess` gives, for images that have been read."""
        tensors = bool(return_tensors)
        features = self.stack(self.frames_of_batch(samples), pad=getattr(self, "do_pad", True), tensors=tensors)
        if data_format is not None and str(data_format).lower().endswith("last"):
            features = _channels_last(features)
        return features.convert(return_tensors)

    def for_values_of(self: Self, images: Any, **settings: Any) -> Self:
        """This processor with other settings, and set to rescale if the images are arrays of fractions in [0, 1].

        That they are is what `do_rescale=False` says; they are brought to the 256 levels that files have, and rescaled
        like them. Raises ValueError if only some of the images are fractions.
        """
        processor = self.replace(**known_alone(type(self).__name__, settings, self.setting_names()))
        if processor.do_rescale:
            return processor
        fractions = [is_fractions(image) for sample in nest_images(images) for image in sample]
        if not any(fractions):
            return processor
        if not all(fractions):
            raise ValueError("With do_rescale=False images must be all levels in 0..255, or all fractions in [0, 1].")
        return processor.replace(do_rescale=True, rescale_factor=1 / 255)

    def read_samples(self, images: Any, input_data_format: str | None = None) -> list[list[Image.Image]]:
        """Images in any accepted form, as one list per sample."""
        nested = nest_images(images)
        return [[read_image(image, self.upstream_reading, input_data_format) for image in sample] for sample in nested]

    def fetch_images(self, images: Any) -> Any:
        """The Pillow image of a path or URL, or the list of those of several."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return read_image(images, self.upstream_reading)

    def frames_of_batch(self, samples: list[list[Image.Image]]) -> list[list[np.ndarray]]:
        """The frames (3, H, W) of each sample, those of its images one after the other."""
        return [[frame for image in sample for frame in self.frames(image)] for sample in samples]

    # Frames to values

    def pixel_table(self) -> np.ndarray:
        """The value (3, 256) float32 of each uint8 level of each channel after rescaling and normalising."""
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (None, None)
        if self.backend == "torch" and self.do_rescale:
            return fused_pixel_table(mean, std, self.rescale_factor)
        return pixel_table(mean, std, self.rescale_factor if self.do_rescale else None)

    def stack(self, samples: list[list[np.ndarray]], pad: bool, tensors: bool) -> Features:
        """Frames (3, H, W) uint8 of each sample, normalised as the settings say and brought to one shape.

        Raises ValueError if no sample holds a frame, or if frames that differ in size are neither padded nor lists.
        """
        sizes = [frame.shape[1:] for sample in samples for frame in sample]
        if not sizes:
            raise ValueError("No images found in the batch: leave `images` out if no sample has one.")
        if not pad and not (tensors and len(set(sizes)) == 1):
            return Features(pixel_values=[[self._values(frame) for frame in sample] for sample in samples])
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        count = max(len(sample) for sample in samples)
        pixels = np.zeros((len(samples), count, 3, height, width), self._dtype)
        mask = np.zeros((len(samples), count, height, width), np.int64)
        table = self.pixel_table()
        for row, sample in enumerate(samples):
            for column, frame in enumerate(sample):
                _, h, w = frame.shape
                self._write(frame, table, pixels[row, column, :, :h, :w])
                mask[row, column, :h, :w] = 1
        return Features(pixel_values=pixels, pixel_attention_mask=mask) if pad else Features(pixel_values=pixels)

    @property
    def _dtype(self) -> type:
        return np.float32 if self.do_rescale or self.do_normalize else np.uint8

    def _write(self, frame: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
        if self._dtype is np.uint8:
            out[...] = frame
        elif self.backend == "torch" and self.do_rescale and self.do_normalize:
            normalize_by_torch(frame, self.image_mean, self.image_std, self.rescale_factor, out)
        else:
            normalize_into(frame, table, out)

    def _values(self, frame: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.empty(frame.shape, self._dtype)
        self._write(frame, self.pixel_table(), out)
        return out

    def _canvas(self, image: Image.Image) -> Canvas:
        """The image in RGB, to be resized by the backend."""
        return canvas(to_rgb(self._rgb_only(image)), self.resample, self.backend)

    def _rgb_only(self, image: Image.Image) -> Image.Image:
        """The image itself, with `upstream_reading` as Pillow brings it to 8 bits. Raises ValueError if it is not RGB and
        the settings forbid to convert it."""
        if not self.do_convert_rgb and image.mode != "RGB":
            raise ValueError(
                f"The image has mode {image.mode} and do_convert_rgb is False: give RGB, or set it to True."
            )
        return image.convert("RGB") if self.upstream_reading and is_deep(image) else image


def checked_size(name: str, size: Any, *forms: tuple[str, ...]) -> dict[str, int]:
    """A size that has the keys of one of the `forms`. Raises WrongSize for anything else."""
    if isinstance(size, dict):
        size = {key: value for key, value in size.items() if value is not None}
        if any(set(form) <= set(size) for form in forms):
            return size
    allowed = " or ".join("{" + ", ".join(f"{key!r}: pixels" for key in form) + "}" for form in forms)
    raise WrongSize(f"{name}={size!r} is not a size for these images: give {allowed}.")


def square_side(name: str, size: Any) -> int:
    """The side of a square, given as it is or as equal height and width. Raises WrongSize for anything else."""
    if isinstance(size, int):
        return size
    size = checked_size(name, size, ("height", "width"))
    if size["height"] != size["width"]:
        raise WrongSize(f"{name}={size!r} is not square, but every frame is: make height and width equal.")
    return size["height"]


def _channels_last(features: Features) -> Features:
    pixels = features["pixel_values"]
    if isinstance(pixels, list):
        moved: Any = [[np.moveaxis(frame, -3, -1) for frame in sample] for sample in pixels]
    else:
        moved = np.moveaxis(pixels, -3, -1)
    return Features(features | {"pixel_values": moved})


def _per_channel(value: float | Iterable[float]) -> list[float]:
    return [float(value)] * 3 if isinstance(value, (int, float)) else [float(v) for v in value]
