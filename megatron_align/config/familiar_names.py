"""Names of options that people know from other programs, and the options that answer them here.

They are those of TRL, SWIFT, LLaMA-Factory, Axolotl, verl and Megatron-LM. They appear in errors only: nothing is read
under a foreign name. A test checks that every option named here exists.
"""

from __future__ import annotations

import re

# option: its names elsewhere, in lower case with underscores; a line that is indented continues the one before
_OPTIONS = """
model.path: model_name_or_path model_name model_path model_id model_id_or_path base_model pretrained_model
    pretrained_model_name_or_path hf_model hf_model_path pretrained_checkpoint finetune_from load load_from
    load_checkpoint_path actor_model_path policy_model_path init_from tokenizer tokenizer_path tokenizer_model
    tokenizer_name tokenizer_name_or_path base_model_config checkpoint_path mcore_model
model.adapter: lora lora_config peft peft_config use_peft use_lora tuner_type train_type finetuning_type
model.adapter.dropout: lora_dropout
model.adapter.dora: use_dora
model.adapter.rank: lora_rank lora_r r
model.adapter.alpha: lora_alpha
model.adapter.targets: lora_target lora_target_modules target_modules lora_modules
model.adapter.rslora: use_rslora
model.adapter.modules_to_save: additional_target lora_modules_to_save
model.adapter.init: init_lora_weights init_weights
model.adapter.path: adapter_name_or_path adapters lora_path resume_from_adapter lora_adapter_path
model.attention: attn_implementation attention_backend attn_impl flash_attn use_flash_attn flash_attention
model.linear: transformer_impl use_transformer_engine use_te
model.freeze: freeze_parameters freeze_modules freeze_layers frozen_modules freeze_trainable_layers
    unfrozen_parameters freeze_llm
data.train: dataset datasets dataset_name dataset_path dataset_dir dataset_names train_file train_files
    train_data train_dataset train_data_path train_path train_dataset_path data_path data_file data_files
    custom_train_dataset_path interleave_probs dataset_weights dataset_mixer mix_strategy dataset_prob
    training_data
data.validation: eval_dataset eval_data eval_file validation_file validation_data val_dataset val_data val_file
    val_files val_data_path valid_data_path eval_data_path test_datasets val_set_size split_dataset_ratio
    eval_split test_file test_data validation_dataset custom_val_dataset_path valid_file
data.shape: dataset_format data_format dataset_type prompt_type conversation_format formatting
data.chat_template: template chat_template_path chat_template_file chat_template_jinja prompt_template
    system_template template_type conversation_template
data.on_bad_record: strict ignore_bad_records skip_bad_samples
data.sequence_length: max_length max_len max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len
    model_max_length max_tokens_per_sample max_prompt_length max_completion_length max_target_length block_size
    context_length max_input_length encoder_seq_length
data.packing: sample_packing pack pack_sequences pack_to_max_length neat_packing padding_free
    use_packed_sequence remove_padding use_remove_padding packed_sequence
data.shuffle: shuffle_dataset dataset_shuffle train_dataloader_shuffle shuffle_data dataloader_shuffle
data.share_prefix: prefix_sharing shared_prefix use_prefix_sharing
data.too_long: truncation_strategy truncation truncation_mode overlong_handling excess_length_strategy
    overlength truncation_side
data.cache: dataset_prepared_path cache_dir tokenized_path data_cache_path dataset_cache_dir overwrite_cache
    preprocessing_cache load_from_cache_file
reference.path: ref_model ref_model_path reference_model reference_model_path ref_load ref_model_name_or_path
    reference_model_name_or_path ref_path teacher_model teacher_model_name_or_path
reference.mode: precompute_ref_log_probs reference_free ref_free cache_reference use_ref_model
    force_use_ref_model
reference.sync_steps: ref_model_sync_steps sync_ref_model tr_dpo_sync_steps
reference.mixup_alpha: ref_model_mixup_alpha
objective.name: stage rl rlhf_type trainer trainer_type training_type task task_type finetuning_stage algorithm
    adv_estimator objective_name training_stage
objective.loss_type: pref_loss dpo_loss_type preference_loss loss_function rlhf_loss_type dpo_loss kto_loss
objective.loss_weights: dpo_loss_weights pref_loss_weights
objective.beta: pref_beta dpo_beta rl_beta kto_beta simpo_beta orpo_beta orpo_alpha cpo_beta kl_coef kl_coeff
    init_kl_coef kl_penalty
objective.label_smoothing: dpo_label_smoothing label_smoothing_factor cdpo_eps
objective.rpo_alpha: pref_ftx ftx_gamma dpo_ftx sft_weight sft_loss_coef
objective.simpo_gamma: gamma simpo_gamma_beta_ratio gamma_beta_ratio
objective.desirable_weight: kto_chosen_weight rl_desirable_weight kto_desirable_weight
objective.undesirable_weight: kto_rejected_weight rl_undesirable_weight kto_undesirable_weight
objective.center_rewards_coefficient: center_reward_coef reward_centering
objective.normalization: loss_normalization average_tokens_across_devices calculate_per_token_loss loss_agg_mode
    loss_reduction
objective.cliprange_value: value_clip value_clip_range cliprange_v vf_clip_param clip_range_vf
objective.vf_coef: value_loss_coef vf_loss_coef value_coef
objective.epsilon: cliprange clip_range clip_eps clip_ratio eps_clip
objective.gae_lambda: lam lambd
objective.iterations: num_ppo_epochs ppo_epochs num_iterations
objective.minibatches: num_mini_batches num_minibatches
critic.path: critic_model_path critic_path critic_pretrain value_model value_model_path critic_model
critic.optimizer.lr: critic_learning_rate critic_lr value_lr
optimizer.lr: learning_rate learningrate lr_rate max_lr peak_lr base_lr init_lr actor_learning_rate step_size
optimizer.weight_decay: wd decay weightdecay adam_weight_decay
optimizer.betas: adam_beta1 adam_beta2 adam_betas beta1 beta2 adamw_betas
optimizer.eps: adam_epsilon adam_eps epsilon optimizer_eps adamw_eps
optimizer.warmup_steps: warmup warmup_ratio warmup_iters lr_warmup_iters lr_warmup_steps lr_warmup_fraction
    lr_warmup_samples num_warmup_steps lr_warmup_ratio warmup_fraction lr_warmup_init
optimizer.schedule: lr_scheduler lr_scheduler_type scheduler scheduler_type lr_decay_style lr_schedule
    learning_rate_scheduler lr_decay_iters lr_decay min_lr lr_scheduler_kwargs cosine_min_lr_ratio
optimizer.clip_grad: max_grad_norm gradient_clipping gradient_clip_val grad_clip max_norm clip_grad_norm
    gradient_clip clip_gradients
train.global_batch_size: gbs batch_size train_batch_size per_device_train_batch_size per_device_batch_size
    micro_batch_size mbs micro_train_batch_size per_gpu_train_batch_size gradient_accumulation_steps
    gradient_accumulation grad_accum accumulate_grad_batches effective_batch_size total_batch_size
    per_device_eval_batch_size eval_batch_size ppo_mini_batch_size train_micro_batch_size_per_gpu
train.global_batch_tokens: batch_tokens max_tokens_per_batch tokens_per_batch max_token_len_per_gpu
train.steps: max_steps train_iters num_steps max_iters max_iterations total_steps num_train_steps
    total_training_steps iterations train_steps num_training_steps exit_interval train_samples
train.epochs: num_train_epochs num_epochs max_epochs n_epochs epoch total_epochs train_epochs nepochs
    number_of_epochs
train.seed: data_seed random_seed shuffle_seed global_seed
train.gradient_accumulation_fusion: fuse_wgrad_accumulation no_gradient_accumulation_fusion
optimizer.implementation: fused_adam use_fused_optimizer fused_optimizer use_apex
train.fp8: fp8_recipe fp8_format fp8_hybrid fp8_e4m3 use_fp8 fp8_config
train.precision: bf16 fp16 fp32 dtype torch_dtype mixed_precision params_dtype model_dtype compute_type amp
    half_precision pure_bf16 tf32 compute_dtype
train.recompute_layers: gradient_checkpointing activation_checkpointing use_gradient_checkpointing recompute
    recompute_granularity recompute_num_layers recompute_method activations_checkpoint_num_layers
    activations_checkpoint_granularity enable_gradient_checkpointing disable_gradient_checkpointing
    gradient_checkpointing_kwargs
train.recompute_modules: recompute_activations selective_recompute activation_checkpointing_modules
train.validate_every: eval_steps eval_interval eval_strategy evaluation_strategy eval_freq val_check_interval
    evals_per_epoch eval_every test_freq val_interval do_eval eval_on_start eval_iters validation_steps
train.early_stopping: early_stopping_patience early_stopping_threshold metric_for_best_model early_stopping_metric
    greater_is_better early_stopping_monitor
checkpoint.keep_best: load_best_model_at_end save_best save_best_only keep_best_checkpoint checkpoint_metric
objective.entropy_coef: entropy_coeff ent_coef entropy_loss_coef
rollout.dynamic_sampling: use_dynamic_sampling filter_groups
rollout.completions: num_generations n_samples_per_prompt num_generations_per_prompt rollout_n
rollout.max_tokens: max_new_tokens response_length max_response_length
rollout.prompts: rollout_batch_size num_prompts_per_step generation_batch_size
validation.generate: generate_samples eval_prompts sample_prompts log_completions predict_with_generate
train.on_nonfinite: skip_nan_steps check_for_nan_in_loss_and_grad logging_nan_inf_filter
parallel.tensor: tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size model_parallel_size
    tensor_parallelism tensor_model_parallel tensor_size
parallel.pipeline: pp pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size
    pipeline_parallelism pipeline_model_parallel num_pipeline_stages pipeline_size
parallel.context: cp cp_size context_parallel context_parallel_size sequence_parallel_size
    sequence_parallel_degree ulysses_sequence_parallel_size ulysses_degree ring_attention_size
    context_parallelism context_size sp_size
parallel.context_kind: cp_comm_type context_parallel_type ring_attention ulysses
parallel.virtual_pipeline: vpp vpp_size virtual_pipeline_model_parallel_size virtual_pipeline_parallel_size
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
parallel.first_stage_layers: decoder_first_pipeline_num_layers num_layers_in_first_pipeline_stage
    pipeline_model_parallel_layout
parallel.last_stage_layers: decoder_last_pipeline_num_layers num_layers_in_last_pipeline_stage
parallel.count_embedding: account_for_embedding_in_pipeline_split
parallel.count_loss: account_for_loss_in_pipeline_split
parallel.sequence: sequence_parallel sequence_parallelism use_sequence_parallel
parallel.overlap_grad_reduce: overlap_grad_reduction ddp_overlap overlap_comm
parallel.overlap_param_gather: overlap_param_sync overlap_param_gather_with_optimizer_step
parallel.overlap_p2p: overlap_p2p_comm overlap_p2p_communication
parallel.timeout_seconds: ddp_timeout distributed_timeout_minutes nccl_timeout distributed_timeout
checkpoint.dir: output_dir output save save_dir save_path out_dir run_dir output_path ckpt_dir checkpoint_dir
    save_checkpoint_path default_local_dir logging_dir project_dir work_dir exp_dir run_name
    overwrite_output_dir add_version out save_folder
checkpoint.save_every: save_steps save_interval save_freq save_strategy saves_per_epoch checkpoint_interval
    checkpointing_steps save_frequency ckpt_interval save_every_n_steps
checkpoint.keep: save_total_limit max_ckpt_to_keep keep_last_n max_checkpoints keep_last keep_latest_k
    max_actor_ckpt_to_keep
checkpoint.keep_every: save_retain_interval non_persistent_save_interval keep_every_n_steps
checkpoint.async_save: async_checkpoint async_ckpt use_async_save dist_ckpt_async_save
checkpoint.resume: resume_from_checkpoint auto_resume_from_checkpoints resume_mode resume_from continue_training
    resume_training resume_from_path auto_resume
checkpoint.export_hf: save_hf save_safetensors export export_model save_hf_model merge_weights_and_save to_hf
    export_hf_checkpoint hf_export
logging.wandb: wandb_project use_wandb wandb_entity wandb_name wandb_run_name wandb_run_id wandb_watch
    wandb_exp_name wandb_save_dir report_to loggers logger trackers log_with
logging.tensorboard: tensorboard_dir use_tensorboard tensorboard_log_dir tb_dir tensorboard_log_interval
logging.mlflow: mlflow_experiment_name mlflow_tracking_uri use_mlflow hf_mlflow_log_artifacts
logging.timing_every: timing_log_level log_timers_to_tensorboard timing_log_option
logging.profile_steps: profile profile_step_start profile_step_end profiler_steps use_pytorch_profiler
"""
# names = how the option differs from what the name means elsewhere
_DIFFERENCES = """
per_device_train_batch_size per_device_batch_size micro_batch_size mbs micro_train_batch_size
    per_gpu_train_batch_size gradient_accumulation_steps gradient_accumulation grad_accum
    accumulate_grad_batches train_micro_batch_size_per_gpu ppo_mini_batch_size batch_size = samples of a step
    over all ranks; micro-batches are packs of data.sequence_length tokens, and their number follows
per_device_eval_batch_size eval_batch_size = validation is packed as training is
warmup_ratio lr_warmup_fraction lr_warmup_ratio warmup_fraction = steps, not a share of them
tokenizer tokenizer_path tokenizer_model tokenizer_name tokenizer_name_or_path = the tokenizer is that of the
    model
val_set_size split_dataset_ratio eval_split = a file of its own: nothing is split off
interleave_probs dataset_weights dataset_mixer mix_strategy dataset_prob = a list of {path, weight}
bf16 pure_bf16 = bf16, the default
fp16 amp half_precision = bf16 or fp32
adam_beta1 adam_beta2 beta1 beta2 = a list of both
gradient_checkpointing activation_checkpointing use_gradient_checkpointing recompute
    enable_gradient_checkpointing = 1: every layer, 0: none
distributed_timeout_minutes = in seconds
min_lr cosine_min_lr_ratio = cosine and linear decay to 0
eval_strategy evaluation_strategy save_strategy = a number of steps
output_dir save = the folder of the run
run_name wandb_run_name wandb_name wandb_exp_name = runs are named after checkpoint.dir
resume_from_checkpoint = auto, the default: the same command resumes
"""
# names = what to know, where no option answers
_NO_OPTION = """
optim optimizer_name optimizer_type = the optimizer is AdamW, sharded over data-parallel ranks (optimizer.*)
logging_steps log_interval log_freq log_every logging_first_step logging_strategy = every step has a row in
    checkpoint.dir/metrics.jsonl
deepspeed ds_config zero_stage zero fsdp fsdp_config use_distributed_optimizer accelerate_config = the optimizer
    is sharded over data-parallel ranks by itself, and parallel.tensor, pipeline and context shard the model
reward_funcs reward_functions reward_model_path reward_model reward_fn custom_reward_function reward_model_enable
    reward_fn_path rm_path reward_weights reward_func_names remote_rm_url = rewards is a list of {kind, weight, ...};
    docs/online.md
multi_objective_aggregation = rewards are summed, then normalised; normalise_then_sum is normalize: group for each
    reward, with objective.scale_rewards: batch
data_parallel_size dp dp_size = the data-parallel size is what parallel.tensor, pipeline and context leave of
    the ranks
nproc_per_node num_gpus n_gpus ngpus gpus num_nodes nnodes num_processes n_gpus_per_node = torchrun starts the
    ranks: torchrun --nproc-per-node 8 -m megatron_align.train --config run.yaml
trust_remote_code = no code of a model's folder is run
use_liger_kernel liger_kernel use_liger = loss kernels are chosen by themselves
dataloader_num_workers preprocessing_num_workers dataset_num_proc num_workers dataset_processes = data are
    tokenised by all cores; megatron-align prepare --processes N sets their number
train_on_inputs train_on_prompt completion_only_loss assistant_only_loss mask_history = answers are trained,
    prompts are not
do_train train_mode = training is what this command does
expert_model_parallel_size ep ep_size expert_parallel_size = mixtures of experts are not trained
"""
# names of objectives = ours; -: none
_OBJECTIVES = """
rm rw reward_model reward_modeling reward_modelling bradley_terry bt rlhf_reward = reward
finetune fine_tune fine_tuning supervised instruct instruction pt pretrain cpt lm causal_lm = sft
preference pref rlhf dpo_trainer = dpo
gspo dapo dr_grpo reinforce reinforce_plus_plus = grpo
gkd distillation knowledge_distillation = distill
remax raft online_dpo xpo nash_md prm gepa star rft = -
"""


def _lines(table: str, separator: str) -> list[tuple[str, str]]:
    joined = table.strip().replace("\n    ", " ").splitlines()
    return [(left, right) for left, _, right in (line.partition(separator) for line in joined)]


def _by_name(table: str) -> dict[str, str]:
    return {name: text for names, text in _lines(table, " = ") for name in names.split()}


FAMILIAR = {name: option for option, names in _lines(_OPTIONS, ": ") for name in names.split()}
OBJECTIVES = _by_name(_OBJECTIVES)
_DIFFERENCE_OF, _NOTE_OF = _by_name(_DIFFERENCES), _by_name(_NO_OPTION)


def plain(name: str) -> str:
    """Return a name as the tables have it: lower case, with underscores, without dashes in front."""
    return re.sub(r"[-\s]+", "_", name.strip().lstrip("-").lower())


def answer(name: str) -> str | None:
    """Return what answers a familiar name, or None if it is not known: an option, and how it differs.

    Args:
        name: a key, or the last part of one.
    """
    key = plain(name)
    if key in FAMILIAR:
        difference = f" ({_DIFFERENCE_OF[key]})" if key in _DIFFERENCE_OF else ""
        return f"here it is {FAMILIAR[key]}{difference}"
    return _NOTE_OF.get(key)
