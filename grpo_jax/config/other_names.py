"""Maps the names that other trainers use to our config keys, so that the error for an unknown key can suggest ours.

The names are those of TRL's GRPOConfig, verl, Tunix and OpenRLHF. Only the last part of a dotted name is compared: `n`
stands for verl's `actor_rollout_ref.rollout.n`. A name may stand for several keys.
"""

from types import MappingProxyType

OTHER_NAMES = MappingProxyType(
    {
        "model.path": "model_name_or_path model_name model_id pretrain",
        "model.param_dtype": "torch_dtype",
        "model.compute_dtype": "bf16 fp16 param_dtype",
        "task.path": "dataset_name prompt_data train_files data_path",
        "task.eval_path": "val_files eval_dataset",
        "task.question": "input_key prompt_key",
        "task.answer": "label_key",
        "prompt.template": "chat_template system_prompt input_template apply_chat_template",
        "reward.parts": "reward_funcs reward_fn reward_model custom_reward_function",
        "reward.weights": "reward_weights",
        "rollout.prompts": "train_batch_size rollout_batch_size batch_size per_device_train_batch_size gen_batch_size "
        "generation_batch_size",
        "rollout.samples": "num_generations n_samples_per_prompt group_size n",
        "rollout.max_prompt_tokens": "max_prompt_length prompt_max_len",
        "rollout.max_tokens": "max_completion_length max_response_length response_length generate_max_len "
        "max_new_tokens max_tokens_to_generate total_generation_steps",
        "rollout.temperature": "temperature",
        "rollout.stop_strings": "stop stop_words",
        "rollout.overlong": "mask_truncated_completions overlong_buffer overlong_filter",
        "rollout.slots": "max_num_seqs max_running_requests",
        "rollout.mesh.tensor": "tensor_model_parallel_size vllm_tensor_parallel_size",
        "train.minibatches": "ppo_mini_batch_size mini_batch_size steps_per_generation num_mini_batches",
        "train.epochs": "num_iterations ppo_epochs max_epochs",
        "train.micro_tokens": "per_device_train_batch_size gradient_accumulation_steps train_micro_batch_size "
        "micro_train_batch_size ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu micro_batch_size",
        "train.chunk_tokens": "compute_logps_chunk_size",
        "train.remat": "gradient_checkpointing enable_gradient_checkpointing",
        "groups.equal": "filter_groups dynamic_sampling dynamic_filtering",
        "advantage.mean": "advantage_estimator adv_estimator",
        "advantage.std": "scale_rewards norm_adv_by_std_in_grpo",
        "loss.ratio": "importance_sampling_level policy_loss_type loss_mode",
        "loss.clip_low": "epsilon clip_ratio clip_ratio_low eps_clip clip_eps",
        "loss.clip_high": "epsilon_high clip_ratio_high eps_clip_high",
        "loss.clip_dual": "delta clip_ratio_c dual_clip",
        "loss.aggregate": "loss_type loss_agg_mode",
        "loss.kl_coef": "beta kl_loss_coef init_kl_coef use_kl_loss kl_beta",
        "loss.kl": "kl_loss_type kl_estimator kl_loss_mode",
        "loss.kl_in": "use_kl_in_reward",
        "loss.entropy_coef": "entropy_coeff entropy_loss_coef",
        "reference.every_updates": "ref_model_sync_steps sync_ref_model",
        "optim.name": "optimizer optim",
        "optim.lr": "learning_rate actor_learning_rate",
        "optim.schedule": "lr_scheduler_type lr_scheduler warmup_style",
        "optim.warmup_steps": "warmup_ratio lr_warmup_steps lr_warmup_ratio",
        "optim.b1": "adam_beta1 beta1",
        "optim.b2": "adam_beta2 beta2",
        "optim.eps": "adam_epsilon",
        "optim.grad_clip": "max_grad_norm max_norm clip_grad",
        "mesh.fsdp": "zero_stage fsdp_size num_gpus",
        "checkpoint.every_steps": "save_steps save_freq save_interval_steps",
        "checkpoint.keep": "save_total_limit max_to_keep max_ckpt_num",
        "eval.every_steps": "eval_steps test_freq eval_every_n_steps eval_interval",
        "log.every_steps": "logging_steps",
        "log.samples": "num_completions_to_print log_completions",
        "total_steps": "max_steps num_train_epochs total_training_steps total_epochs num_episodes num_steps",
    }
)


def our_keys(name: str) -> list[str]:
    """Returns the keys that a name of another trainer, dotted or not, stands for; empty if it is not listed."""
    last = name.rpartition(".")[2]
    return [key for key, others in OTHER_NAMES.items() if last in others.split()]
