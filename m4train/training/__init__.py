"""Training on batches that come from anywhere, of models that keep to `model_protocol.py`. No model is known by name.

- `trainer.py`: the loop; `step.py`: the losses and counts of one optimizer step
- `engines/`: where a model is placed and updated: one process, DDP, FSDP2, DeepSpeed
- `callbacks/`: what happens in addition to training, one per file
- `checkpoints/`: writing, finding and reading checkpoints
- `equip.py`, `freezing.py`, `adapters.py`, `quantization.py`: what trains, and how the rest is stored
- `optim.py`, `muon.py`, `schedule.py`, `guard.py`: what an update does, and which are skipped
- `metrics.py`, `throughput.py`, `parts_table.py`, `heartbeat.py`: what a run says about itself
"""
