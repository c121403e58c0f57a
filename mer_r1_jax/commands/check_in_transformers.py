"""Checks an export with transformers: mer-r1 check-in-transformers CASES.npz EXPORT [--out=...]

Feeds the cases that `mer-r1 export-check` wrote to transformers' own Thinker, loaded from the export, in
float32 on the CPU: the teacher-forced logits of our answers and its own greedy answers are compared with ours. Needs
torch and transformers (4.57 or 5.x) and nothing of this project, so this file runs as a script of its own in any
environment that has the two: python check_in_transformers.py CASES.npz EXPORT

Exit code 0 when everything agrees, 1 when something does not.
"""

import argparse
import json
import os
import sys
from typing import Any

import numpy as np

LOGIT_LIMIT = 2e-3  # absolute, float32; structural mistakes move logits by 1 and more
SETTINGS = ("cases", "eos_ids", "suppressed_ids", "max_new_tokens", "use_audio_in_video")
# Arrays of a case that are not the processor's tensors.
OURS = ("completion_ids", "logits", "id", "answer", "truncated", "overruled")


def _limit(text: str) -> float:
    limit = float(text)
    if not 0 < limit < float("inf"):  # NaN is no limit: nothing is beyond it
        raise argparse.ArgumentTypeError(f"got {text!r}, expected more than 0 and finite")
    return limit


def _threads(text: str) -> int:
    threads = int(text)
    if not 0 <= threads <= 4096:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 to 4096")
    return threads


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", help=".npz file of `mer-r1 export-check`")
    parser.add_argument("export", help="Hugging Face directory")
    parser.add_argument("--out", help="JSON file to write the result to")
    parser.add_argument("--limit", type=_limit, default=LOGIT_LIMIT, help="largest difference of a logit")
    parser.add_argument("--threads", type=_threads, default=0, help="threads of torch; 0 = its own choice")
    options = parser.parse_args(None if argv is None else argv[1:])
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"error: {error}. This check needs torch and transformers: pip install torch transformers")
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    result = check(options.cases, options.export, options.limit)
    result |= {"transformers": transformers.__version__, "torch": torch.__version__}
    show(result)
    if options.out:
        beside = f"{options.out}.new"  # what is under the name itself is whole, also on a full disk
        with open(beside, "w") as file:
            json.dump(result, file, indent=1)
        os.replace(beside, options.out)
    return 0 if result["agrees"] else 1


def check(cases_file: str, export: str, limit: float = LOGIT_LIMIT) -> dict:
    """Compares transformers' Thinker with the cases.

    Args:
        cases_file: .npz of `mer-r1 export-check`.
        export: Hugging Face directory.
        limit: largest difference of a logit.

    Returns:
        Counts, the largest difference, one entry a clip, and whether everything agrees.
    """
    import torch
    import transformers

    loaded = np.load(cases_file)
    settings = {name: loaded[name] for name in SETTINGS}
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        export, attn_implementation="eager", dtype=torch.float32
    ).eval()
    clips = []
    for number in range(int(settings["cases"])):
        prefix = f"case{number:03d}."
        case = {name.removeprefix(prefix): loaded[name] for name in loaded.files if name.startswith(prefix)}
        clips.append(check_case(model, case, settings))
    difference = max(clip["logit_difference"] for clip in clips)
    same = sum(clip["same_answer"] for clip in clips)
    return {
        "clips": len(clips),
        "largest_logit_difference": difference,
        "limit": limit,
        "same_answers": same,
        "distinct_answers": len({clip["answer"] for clip in clips}),
        "truncated": sum(clip["truncated"] for clip in clips),
        "overruled_tokens": sum(clip["overruled"] for clip in clips),
        "agrees": bool(difference <= limit and same == len(clips)),
        "by_clip": clips,
    }


def check_case(model, case: dict, settings: dict) -> dict:
    """One clip: the logits of our completion, and transformers' own greedy completion."""
    import torch

    inputs: dict[str, Any] = {name: torch.from_numpy(value) for name, value in case.items() if name not in OURS}
    inputs["use_audio_in_video"] = bool(settings["use_audio_in_video"])
    ours = torch.from_numpy(case["completion_ids"].astype(np.int64))
    prompt = inputs["input_ids"].shape[1]
    forced = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ours[None]], dim=1))
    forced["attention_mask"] = torch.ones_like(forced["input_ids"])
    suppressed = settings["suppressed_ids"].tolist()
    with torch.no_grad():
        logits = model(**forced).logits[0, prompt - 1 : -1].float().numpy()
        generated = model.generate(
            **inputs,
            max_new_tokens=int(settings["max_new_tokens"]),
            do_sample=False,
            eos_token_id=settings["eos_ids"].tolist(),
            suppress_tokens=suppressed or None,  # what our sampler never samples
        )[0, prompt:].numpy()
    matching = np.cumprod(generated[: len(ours)] == ours[: len(generated)].numpy())
    return {
        "id": str(case["id"]),
        "answer": str(case["answer"]),
        "tokens": len(ours),
        "truncated": bool(case["truncated"]),
        "overruled": int(case["overruled"]),
        "logit_difference": float(np.abs(logits - case["logits"]).max()),
        "same_answer": bool(len(generated) == len(ours) and matching.all()),
        "same_tokens": int(matching.sum()),
    }


def show(result: dict) -> None:
    """Prints the result."""
    print(f"transformers {result['transformers']}, torch {result['torch']}, {result['clips']} clips")
    print(f"  largest difference of a logit: {result['largest_logit_difference']:.2g} (limit {result['limit']:.2g})")
    print(f"  same greedy answers: {result['same_answers']} of {result['clips']}")
    print(f"  distinct answers among them: {result['distinct_answers']}, cut at the cap: {result['truncated']}")
    if result["overruled_tokens"]:
        print(
            f"  {result['overruled_tokens']} tokens are not the likeliest one, which our sampler never samples; plain "
            "generate() would have taken it"
        )
    for clip in result["by_clip"]:
        if not clip["same_answer"]:
            print(f"  {clip['id']!r}: the first {clip['same_tokens']} of {clip['tokens']} tokens are the same")


if __name__ == "__main__":
    sys.exit(main())
