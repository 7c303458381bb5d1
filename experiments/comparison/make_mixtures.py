"""Writes llama.cpp's own files of a model, by llama.cpp's own quantizer: its mixtures, and its pure Q4_K_M.

pip install llama-cpp-python==0.3.36      # in an environment of its own; builds llama.cpp
sqjax convert MODEL model.f32.gguf --type f32
python experiments/comparison/make_mixtures.py model.f32.gguf FOLDER/model
"""

import argparse

import llama_cpp

# LLAMA_FTYPE_MOSTLY_* of include/llama.h.
TYPES = {"Q4_K_M": 15, "Q4_K_S": 14, "Q5_K_S": 16, "IQ4_XS": 30, "IQ4_NL": 25, "Q8_0": 7}


def quantize(source: str, target: str, kind: str, *, pure: bool, threads: int) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure, parameters.nthread = TYPES[kind], pure, threads
    if code := llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters):
        raise SystemExit(f"llama.cpp does not quantize {source} to {kind}: {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="F32 file that sqjax convert wrote")
    parser.add_argument("prefix", help="of the files to write")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for kind in TYPES:
        quantize(args.source, f"{args.prefix}.llamacpp.{kind}.gguf", kind, pure=False, threads=args.threads)
    quantize(args.source, f"{args.prefix}.llamacpp.pure-Q4_K_M.gguf", "Q4_K_M", pure=True, threads=args.threads)


if __name__ == "__main__":
    main()
