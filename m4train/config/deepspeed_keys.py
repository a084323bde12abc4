"""The keys of a DeepSpeed configuration, which DeepSpeed itself ignores when they are misspelled.

Written down here, since importing DeepSpeed takes seconds and torch; a test compares them with what it reads.
"""

from __future__ import annotations

_TOP = """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last datastates_ckpt
    disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine
    log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients
    progressive_layer_drop scheduler seq_parallel_communication_data_type sequence_parallel_size sparse_attention
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
"""

_ZERO = """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients elastic_checkpoint
    enable_sanity_checks ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings memory_efficient_linear offload_optimizer offload_param overlap_comm
    override_module_apply parameter_alignment pipeline_loading_checkpoint reduce_bucket_size reduce_scatter
    round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
    stage3_gather_16bit_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance
    stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_param_persistence_threshold
    stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
    use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
    zero_quantized_nontrainable_weights zero_quantized_weights
"""

TOP = frozenset(_TOP.split())
ZERO = frozenset(_ZERO.split())

# Keys a user may set, since a test trains with each of them and finds the same weights (tests/distributed/test_deepspeed_keys.py),
# or since they only report. What else DeepSpeed knows may change numbers, or what a checkpoint holds, without a word.
FREE_TOP = frozenset(
    [
        "comms_logger",
        "comet",
        "csv_monitor",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "log_level",
        "memory_breakdown",
        "steps_per_print",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
    ]
)
FREE_ZERO = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "ignore_unused_parameters",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    ]
)
ON_BY_DEFAULT = frozenset(
    ["compute_grad_norm", "load_from_fp32_weights", "override_module_apply", "use_multi_rank_bucket_allreduce"]
)
