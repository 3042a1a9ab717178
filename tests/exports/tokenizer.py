"""A tokenizer like Qwen2's that is small enough for the golden models."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ("what is it", "  a  b\n\nc", "THE THING.", "<|im_start|>user\nthe<|im_end|>", "it is 12 (3 + 45)? </s>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer like Qwen2's, which has fewer ids than the golden models have rows."""
    special = ["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted({letter for text in (*WORDS, CHAT) for letter in text.replace(" ", "Ġ").replace("\n", "Ċ")})
    merges = [("t", "h"), ("th", "e"), ("Ġ", "i"), ("Ġi", "t"), ("Ċ", "Ċ")]
    pieces = [*special, *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template={"default": CHAT, "tool_use": "tools " + CHAT},
    )
