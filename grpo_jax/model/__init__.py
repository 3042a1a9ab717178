"""The decoder: one network for all model families, as pure functions of its parameters.

Modules, in reading order:

    architecture  `ModelConfig`, the shape of a decoder
    parameters    the table of parameters, one row for each, and where they live on the mesh
    mask          attention masks and a reference implementation of attention
    blockwise     attention block by block, in memory linear in the row length
    kernels       attention by vendor kernels: splash on TPU, cuDNN on GPU
    cache         the KV cache, and writing tokens into it
    token_attention  attention of one new token per row, by a kernel for GPUs
    rope          rotary position embeddings
    layers        projections, norms, token embeddings and the MLP
    attention     grouped-query and latent attention, with or without a KV cache
    experts       mixtures of experts
    decoder       `forward` and `hidden_states`: all layers, and logits
"""
