"""Pretrained models in and out: Hugging Face folders, GGUF files and hub ids.

families   translates a config.json to `ModelConfig`, and tensor names to parameters
gguf_file  reads GGUF files
tensors    tensors on disk, read a part at a time
source     finds a model and reads its config
tokenizer  loads tokenizers
model_io   `load` and `save`
"""
