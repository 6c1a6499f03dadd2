"""Try training parameters on validation classes and record every one that was tried.

    python benchmarks/choose_hyperparameters.py --dataset scenes
    python benchmarks/choose_hyperparameters.py --dataset scenes --model hamlet_resnet18 --group text

The shared parameters are tried on the plain control gem_resnet18, so that the choice favours none of the compared
configurations; the rate of the heads on spca_resnet18, which was the first to fail at the shared one; the text weights
on HAMLET, which alone uses them. Query and gallery are never looked at. Each row of
results/tuning/<dataset>-<group>.csv holds one candidate, its seconds and its validation mAP; workflow/quick.yaml
says what was chosen.
"""

import argparse
import tempfile

import pandas as pd

from hamlet import paths, training
from hamlet.artifact import run
from hamlet.artifact.profiles import Run, parameters

GROUPS = {
    "shared": [
        {"loss": "proxy_anchor", "margin": 0.1, "scale": 32.0},
        {"loss": "cosface", "margin": 0.0, "scale": 16.0},
        {
            "loss": "cosface",
            "margin": 0.0,
            "scale": 16.0,
            "learning_rate": 2e-3,
            "backbone_learning_rate": 2e-3,
        },
        {"loss": "proxy_anchor", "margin": 0.1, "scale": 32.0, "crop_scale": 0.4},
        {"loss": "cosface", "margin": 0.0, "scale": 16.0, "crop_scale": 0.4},
        {"loss": "cosface", "margin": 0.2, "scale": 16.0, "crop_scale": 0.4},
    ],
    "heads": [
        {"learning_rate": 1e-3, "images_per_class": 4},
        {"learning_rate": 1e-3, "images_per_class": 1},
        {"learning_rate": 2e-4, "images_per_class": 1},
    ],
    "text": [
        {"text_guidance": 0.0, "text_alignment": 0.0},
        {"text_guidance": 1.0, "text_alignment": 0.5},
        {"text_guidance": 0.0, "text_alignment": 0.5},
        {"text_guidance": 3.0, "text_alignment": 1.0},
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--model", default="gem_resnet18")
    parser.add_argument("--group", default="shared", choices=GROUPS)
    parser.add_argument("--profile", default="quick")
    parser.add_argument(
        "--epochs", type=int, default=4, help="fewer than the profile's: candidates are only ordered"
    )
    given = parser.parse_args()
    job = Run(given.profile, given.dataset, given.model, "default", 0)
    base = parameters(job)
    data = run.load_data(given.dataset, base)
    rows = []
    for changes in GROUPS[given.group]:
        settings = base | changes | {"epochs": given.epochs}
        model = training.build_model(job, settings)
        with tempfile.TemporaryDirectory() as folder:
            trained = training.train(model, data, settings, job.seed, folder)
        kept = {k: settings[k] for k in sorted({k for group in GROUPS[given.group] for k in group})}
        score = trained.curves["validation_mAP"].iloc[-1]
        rows.append(
            {"model": given.model, **kept, "epochs": given.epochs, "seconds": round(trained.seconds, 1)}
            | {"validation_mAP": round(float(score), 4)}
        )
        print(rows[-1], flush=True)
        path = paths.output_root() / "results" / "tuning" / f"{given.dataset}-{given.group}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)


if __name__ == "__main__":
    main()
