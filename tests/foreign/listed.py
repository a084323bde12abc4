"""Tests of transformers that need what m4train does not have: the reason, and patterns of their names."""

LISTED: dict[str, tuple[str, ...]] = {
    "attention is chosen by device and dtype: there is no eager implementation to compare with, nor one to switch to": (
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically*",
        "test_config_attn_implementation_setter",
        "test_eager_matches_sdpa_*",
        "test_get_image_features_attentions",
        "test_sdpa_*",
    ),
    "get_image_features gives the features themselves, as transformers did up to 4.57, instead of an output object": (
        "test_get_image_features_hidden_states",
        "test_get_image_features_output_*",
    ),
    "generate refuses output_attentions and output_hidden_states of every step, which the test asks for next to scores": (
        "test_*_dict_output",
        "test_*_dict_outputs*",
        "test_assisted_decoding_matches_greedy_search*",
    ),
    "speculative decoding is not implemented: generate refuses assistant_model and its like": (
        "test_assisted_decoding_sample*",
        "test_generate_with_mtp",
        "test_prompt_lookup_decoding_*",
    ),
    "generate asks for a prompt, where transformers begins with bos": ("test_generate_without_input_ids",),
    "what generate returns holds no cache to go on from": ("test_generate_continue_from_*",),
    "the cache is of a class of its own": ("test_past_key_values_format",),
    "private methods by which generate of transformers makes the inputs of a step": (
        "test_generate_with_and_without_position_ids",
        "test_prepare_inputs_for_generation_kwargs_forwards",
    ),
    "the test asks for a base class of transformers": ("test_inherits_generation_mixin",),
    "from_pretrained refuses missing tensors, and tensors of another shape, instead of making them up": (
        "test_can_init_all_missing_weights",
        "test_can_load_ignoring_mismatched_shapes",
        "test_correct_missing_keys",
        "test_from_pretrained_no_checkpoint",
        "test_model_weights_reload_no_missing_tied_weights",
        "test_mismatched_shapes_*",
    ),
    "the same refusal in a sentence of m4train, or as ConfigError instead of OSError": (
        "test_call_numpy_4_channels",
        "test_cannot_load_with_meta_device_context_manager",
        "test_chat_template_saving_rejects_path_traversal",
        "test_config",
        "test_missing_images_error",
        "test_resize_tokens_embeddings",
    ),
    "the test looks at the attribute gradient_checkpointing of layers, which m4train does not keep": (
        "test_gradient_checkpointing_backward_compatibility",
        "test_gradient_checkpointing_enable_disable",
        "test_training_gradient_checkpointing*",
    ),
    "post_init and private initialisation of transformers": (
        "test_init_weights_can_init_buffers",
        "test_initialization",
        "test_resize_embeddings_untied_no_reinit_on_post_init",
    ),
    "generation_config.json is written if something is stated, not always": ("test_save_load",),
    "tensor-parallel plans of transformers": ("test_tp_plan_matches_params",),
    "rope scaling is as the decoder of the published models has it: the test looks for modules of transformers": (
        "test_model_rope_scaling*",
    ),
    "folders are written for 4.46 to 5.x at once, so that there are more files": (
        "test_chat_template_save_loading",
        "test_processor_from_and_save_pretrained*",
    ),
    "a bare string among the items of a message is refused: the published templates would show an image for it": (
        "test_apply_chat_template",
    ),
    "a template that closes turns with no special token is refused where ids are asked for": (
        "test_apply_chat_template_assistant_mask",
    ),
    "add_bos_token is decided by tokenizer.json alone": ("test_get_num_multimodal_tokens_matches_processor_call",),
    "audio and video are refused: frames of a video are given as images": (
        "test_*_video",
        "test_*_video_kwargs",
        "test_*_video_processor_*",
        "test_model_input_names",
        "SmolVLMProcessorTest::*",  # its set-up asks for the token of a video
        "test_processor_text_has_no_visual",
        "test_video_processor_defaults*",
    ),
    "types of keyword arguments that transformers keeps for its own classes": (
        "test_fast_image_processor_explicit_none_preserved",
        "test_doubly_passed_kwargs",
        "test_flat_kwarg_applied_when_modality_dict_lacks_it",
        "test_image_processor_defaults_preserved_by_image_kwargs",
        "test_kwargs_overrides_default_image_processor_kwargs",
        "test_kwargs_overrides_default_tokenizer_kwargs",
        "test_overlapping_text_image_kwargs_handling",
        "test_structured_kwargs_nested",
        "test_structured_kwargs_nested_from_dict",
        "test_tokenizer_defaults_preserved_by_kwargs",
        "test_unstructured_kwargs",
        "test_unstructured_kwargs_batched",
    ),
    "the set-up gives return_tensors to the constructor of an image processor, which takes settings alone": (
        "IdeficsProcessorTest::*",
    ),
    "from_dict takes a mapping alone": ("test_image_processor_from_dict_with_kwargs",),
}
