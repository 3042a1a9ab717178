"""Pretrained models in and out: Hugging Face folders, GGUF files and hub ids.

Modules, in reading order:

    families       the table of supported model families
    hf_config      translates config.json to `ModelConfig`
    tensor_names   maps parameters to the tensors of a checkpoint
    model_files    checks the files of a model folder, and explains what other folders hold
    gguf_header    reads the header of GGUF files and dequantizes their tensors
    gguf_file      reads GGUF files as Hugging Face checkpoints
    quantization   recognizes quantized checkpoints
    mismatches     explains tensors that a decoder does not have
    hub            downloads models from the Hugging Face Hub
    packaged       finds the models that Python packages hold
    source         finds a model and reads its config
    tensors        opens the tensors of a checkpoint and reads a part at a time
    fused_tensors  splits and joins tensors that a family stores fused
    tokenizer      loads tokenizers
    portable       rewrites config files of an export for older releases of `transformers`
    placing        assembles parameters on their devices
    reading        `load`
    writing        `save`
"""
