"""Training: `trainer.py` is the loop, `step.py` one optimizer step, `model_protocol.py` what is asked of a model.

equip (freezing, adapters, quantization, token rows)   what training adds to a plain model
optim, muon, schedule, loss_weights, neftune           the update and what the loss counts
engines/                                               one process, DDP, FSDP2, DeepSpeed behind the same calls
checkpoints/                                           writing, finding and reading them; adapters as peft folders
callbacks/                                             everything optional, one file each
heartbeat, stopping, guard, worst_batch                hangs, stops, non-finite steps, memory at step 1
metrics, throughput, parts_table                       what is logged and shown
"""
