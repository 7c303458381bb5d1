"""Writes data/cross_entropy_demo8.json: what transformers says about the embedded model, for test_evaluation.py.

Run from the repository's root where torch and transformers are installed (sqjax need not be):

    python tests/make_cross_entropy_demo8.py

Everything after the forward pass is float64. The student is the model with its matrices rounded to multiples of 1/32,
which any two programs agree on exactly.
"""

import json
import pathlib

import tokenizers
import torch
import transformers

LENGTH, WINDOWS = 256, 4
MESSAGES = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "  Why is the sky dark at night?\n"},
    {"role": "assistant", "content": "Because light from far stars has not arrived yet.\n\nÄußerst kurz: 时间 🌌"},
    {"role": "user", "content": "And why is it <b>blue</b> & bright by day?"},
]


def losses_and_divergence(model, student, tokens):
    with torch.no_grad():
        log_p, log_q = (torch.log_softmax(m(tokens).logits[:, :-1].double(), dim=-1) for m in (model, student))
    target = tokens[:, 1:, None]
    loss_reference, loss = (-x.gather(2, target)[..., 0] for x in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    top1 = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    return {
        name: x.mean(-1).tolist()
        for name, x in {"kl": kl, "loss": loss, "loss_reference": loss_reference, "top1": top1}.items()
    } | {"kl_max": kl.max().item()}


def main():
    folder = pathlib.Path("sqjax/demo8")
    text = pathlib.Path("sqjax/suites/demo.txt").read_text(encoding="utf-8")
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [*core.encode(text, add_special_tokens=False).ids, core.token_to_id("<|endoftext|>")]
    tokens = torch.tensor(ids[: LENGTH * WINDOWS]).reshape(WINDOWS, LENGTH)

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    student = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for name, parameter in student.named_parameters():
        if parameter.ndim == 2:
            parameter.data = torch.round(parameter.data * 32) / 32
        assert parameter.ndim != 2 or "conv" not in name

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = {
        "messages": MESSAGES,
        "rendered": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "with_generation_prompt": tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True),
        "tokens": core.encode(tokenizer.apply_chat_template(MESSAGES, tokenize=False), add_special_tokens=False).ids,
    }
    golden = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "total_tokens": len(ids),
        "length": LENGTH,
        "tokens": tokens.tolist(),
        "chat": chat,
    } | losses_and_divergence(model, student, tokens)
    path = pathlib.Path("tests/data/cross_entropy_demo8.json")
    path.write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
