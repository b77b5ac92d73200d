"""Seven algorithms on the image quickstart with equal numbers of scored pictures, as curves in one picture.

    python benchmarks/compare_algorithms.py OUT_DIR [ALGORITHM ...]

trains what is not in ``OUT_DIR`` yet, all seven or those that are named (a run takes 1 to 5 minutes with one thread),
then draws ``benchmarks/compare_algorithms.png`` of all that is there and prints a table of gains.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from mmrl.config import load_config
from mmrl.run import train

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "quickstart" / "image.yaml"
SEEDS = (0, 1, 2)
SCORED = 3840
"""Pictures that each run scores to train on."""

ALL = ["trainer.warmup=5", "trainer.save_every=0", "trainer.tensorboard=false"]
IN_GROUPS = ["data.batch_size=12", "trainer.steps=40", "trainer.eval_every=10"]  # 12 groups of 8 pictures a step
WHOLE = ["pipeline.step=ode", "pipeline.window=all", "pipeline.same_noise=false"]  # pictures, not steps, are explained
# Fits have no counterweight: what is fitted anew after each small step drifts away with its own faults.
IN_ROUNDS = [
    *WHOLE,
    "data.batch_size=96",
    "trainer.steps=5",
    "trainer.eval_every=1",
    "trainer.warmup=1",
    "trainer.lr=1.5e-4",
    "trainer.ema.decay=0.97",
]
DIFFERENTIABLE = [
    *WHOLE,
    "pipeline.batch_size=32",
    "data.batch_size=32",
    "trainer.steps=120",
    "trainer.eval_every=30",
    # The verifier has no gradient; a small CLIP model of the same world has one.
    "rewards=[{type: clip, model: builtin:clip-shapes}]",
]
SETTINGS = {
    "Flow-GRPO": [*IN_GROUPS, "trainer.lr=8e-4"],
    "DiffusionNFT": [*IN_GROUPS, *WHOLE, "algorithm={type: diffusion_nft, noise_draws: 4}", "trainer.lr=6e-4"],
    "RWR": [*IN_ROUNDS, "algorithm={type: rwr, beta: 0.03, noise_draws: 3, minibatches: 8, epochs: 2}"],
    "RAFT": [*IN_ROUNDS, "algorithm={type: raft, keep: 1, noise_draws: 8, minibatches: 8, epochs: 3}"],
    "online DPO": [
        *IN_GROUPS,
        *WHOLE,
        "algorithm={type: dpo, pairs: ranked, beta: 10, noise_draws: 4}",
        "trainer.lr=6e-4",
    ],
    "DRaFT-K (K = 10)": [*DIFFERENTIABLE, "algorithm={type: reward_backprop, grad_steps: 10}", "trainer.lr=3e-4"],
    "ReFL": [*DIFFERENTIABLE, "algorithm={type: refl, stop: [0.1, 0.6], hinge: null}", "trainer.lr=3e-4"],
}


def curve(folder: Path) -> tuple[list[int], list[float]]:
    """Numbers of scored pictures and held-out scores of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval/shapes/mean"] for line in lines if "eval/shapes/mean" in line}
    return [SCORED * step // max(found) for step in found], list(found.values())


def main(out: Path, names: list[str]) -> None:
    for name in names:
        for seed in SEEDS:
            folder = out / name / str(seed)
            if not (folder / "summary.json").exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a stopped run left
                own = [f"seed={seed}", f"run_dir={json.dumps(str(folder))}"]
                train(load_config(CONFIG, [*ALL, *SETTINGS[name], *own]))
    curves = {}
    for name in SETTINGS:
        runs = [out / name / str(seed) for seed in SEEDS]
        if all((run / "summary.json").exists() for run in runs):
            curves[name] = [curve(run) for run in runs]
    draw(curves, HERE / "compare_algorithms.png")
    print("| algorithm | before | after, seeds 0, 1, 2 | gain |\n|---|---|---|---|")
    for name, runs in curves.items():
        ends = [values[-1] for _, values in runs]
        gain = sum(ends) / len(ends) - runs[0][1][0]
        print(f"| {name} | {runs[0][1][0]:.3f} | {', '.join(f'{end:.3f}' for end in ends)} | {gain:+.3f} |")


def draw(curves: dict[str, list[tuple[list[int], list[float]]]], path: Path) -> None:
    """The mean of the seeds as a line, their range as a band."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    for name, runs in curves.items():
        scored = runs[0][0]
        scores = list(zip(*(values for _, values in runs), strict=True))
        (line,) = axes.plot(scored, [sum(s) / len(s) for s in scores], marker="o", label=name)
        axes.fill_between(scored, list(map(min, scores)), list(map(max, scores)), alpha=0.12, color=line.get_color())
    axes.set(xlabel="pictures scored in training", ylabel="held-out score of the verifier")
    axes.set_title("Image quickstart: mean and range of three seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(SETTINGS))
