"""Turns comparison.json into lines of results.jsonl, one a file and runtime, on standard output.

python experiments/comparison/record.py nano34 REPORT/comparison.json >> experiments/comparison/results.jsonl
"""

import json
import sys

FACTS = ("file_bytes", "tensor_bytes", "bits_per_weight", "types", "sha256")
METRICS = ("tokens", "sequences", "kl", "kl_interval", "top1", "cross_entropy", "cross_entropy_reference", "recovery")


def main() -> None:
    model, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        result = json.load(file)
    shared = {"model": model, "reference_sha256": result["reference_facts"]["sha256"], "date": result["date"]}
    shared |= {"versions": result["versions"], "device": result["device"]}
    shared |= {"suites": {name: suite["sha256"] for name, suite in result["suites"].items()}}
    for name, file in (result["files"] | {result["baseline"]["name"]: result["baseline"]}).items():
        for runtime, found in (("jax", file), ("llama.cpp", file.get("llama.cpp"))):
            if found:
                line = {"file": name, "runtime": runtime} | {key: file[key] for key in FACTS}
                line |= {key: found[key] for key in METRICS}
                by_suite = {suite: part["kl"] for suite, part in found["suites"].items()}
                speed = {"kl_by_suite": by_suite, "tokens_per_second": found["tokens_per_second"]}
                print(json.dumps(line | speed | shared))


if __name__ == "__main__":
    main()
