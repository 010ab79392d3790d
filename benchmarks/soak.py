"""A long training that is killed again and again, beside one that is not.

    python benchmarks/soak.py --backend torch --steps 10000 --kills 100

Two runs of the same program: one goes through, the other is ended by SIGKILL at random
moments, a third of them while a checkpoint is being written and a third while it
starts, and started again. Each
is a sequence of calls of `fit` on batches of changing shapes, packed and not, with
random anchors and a `TrainingCheckpoint`. In the end weights, optimizer and random
generators of both must be the same, bit for bit; a run that ends before it was killed
as often as asked for fails, too.

`FOLDER/log.jsonl` gets a line with resident memory and open handles every 500 steps and
one for every kill. The script itself may be ended and started again: it goes on.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

# `[B, T]` of the batches, one after the other.
SHAPES = ((2, 24), (1, 40), (3, 16), (2, 33))
STEPS_PER_LINE = 500
# Between two kills a run does up to so many times its share of the steps: on average
# a little less than that, so that all kills find a run to end.
LARGEST_SHARE = 1.8
# When a run is killed: in or between any steps, while it writes a checkpoint, or within
# so many seconds, while it starts and reads where it was.
MOMENTS = ("training", "writing", "starting")
LONGEST_START = 8.0


def build():
    """The model, with the same weights in every process."""
    import keras
    import keras_hub

    import keras_ebft

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=64,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
    )
    causal_lm = keras_hub.models.LlamaCausalLM(backbone)
    sampler = keras_ebft.BlockSampler(
        rollout_length=2,
        context_length=4,
        num_samples=2,
        anchors="random",
        num_anchors=3,
    )
    model = keras_ebft.EBFTModel(causal_lm, sampler, ce_weight=0.1, seed=0)
    model.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0))
    return model


def rows(number, steps_per_fit):
    """Documents of the call of `fit` with this number."""
    import numpy as np

    batch, length = SHAPES[number % len(SHAPES)]
    draw = np.random.default_rng(number)
    shape = (batch * steps_per_fit, length)
    found = {"token_ids": draw.integers(0, 64, shape).astype("int32")}
    if number % 2:
        found["segment_ids"] = np.repeat([[1, 2]], (length + 1) // 2, axis=1)[
            :, :length
        ].repeat(shape[0], axis=0)
    return batch, found


def write(folder, entry):
    """Adds a line to the log."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 1), **entry}) + "\n")


def resources():
    """Resident MiB, the most there was, and open handles of this process."""
    status = Path("/proc/self/status").read_text("ascii")
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "resident_mib": int(sizes["VmRSS"].split()[0]) // 1024,
        "peak_mib": int(sizes["VmHWM"].split()[0]) // 1024,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": int(sizes["Threads"]),
    }


def train(folder, steps, steps_per_fit, save_freq):
    """Trains from where the files in a folder say, to the end."""
    import keras
    import numpy as np

    import keras_ebft

    model = build()
    name = folder.name
    files = {
        int(file.name.split(".")[0][3:]): file
        for file in folder.glob("fit*.weights.h5")
    }

    counted = [0]

    def count(batch, logs):
        # Not the batch: resuming goes past those that were trained on before.
        done = model.steps_trained
        if done == counted[0]:
            return
        counted[0] = done
        (folder / "steps").write_text(str(done))
        if done % STEPS_PER_LINE == 0 or done == steps:
            write(folder.parent, {"run": name, "step": done, **resources()})

    for number in range(max(files, default=0), -(-steps // steps_per_fit)):
        batch, documents = rows(number, steps_per_fit)
        left = min(steps - number * steps_per_fit, steps_per_fit)
        documents = {key: value[: left * batch] for key, value in documents.items()}
        path = folder / f"fit{number}.weights.h5"
        model.fit(
            documents,
            batch_size=batch,
            verbose=0,
            callbacks=[
                keras_ebft.TrainingCheckpoint(path, save_freq=save_freq),
                keras.callbacks.LambdaCallback(on_train_batch_end=count),
            ],
        )
        for old in folder.glob(f"*fit{number - 1}.weights.h5*"):
            old.unlink()
    values = [*model.variables, *model.optimizer.variables]
    kept = {str(i): keras.ops.convert_to_numpy(v) for i, v in enumerate(values)}
    unfinished = folder / "unfinished.npz"
    np.savez(unfinished, **kept)
    unfinished.replace(folder / "end.npz")


def start(folder, arguments):
    """Starts the training of one run as a process of its own.

    Forked from one that has imported what takes longest, and done nothing else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps").unlink(missing_ok=True)
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keras_ebft"])
    settings = arguments.steps, arguments.steps_per_fit, arguments.save_freq
    process = context.Process(target=train, args=(folder, *settings))
    process.start()
    return process


@contextlib.contextmanager
def ended_with_this_script(process):
    """Context in which a run does not outlive the script."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def finish(process):
    """Waits for a run, and ends the script where it failed."""
    with ended_with_this_script(process):
        process.join()
    if process.exitcode:
        sys.exit(f"A run ended with code {process.exitcode}; see above.")


def kill(process, folder, chance, most_steps, moment):
    """Ends a run at a random moment.

    Args:
        process: the run.
        folder: `Path` of its files.
        chance: `random.Random`.
        most_steps: int, the most steps that it does before.
        moment: one of `MOMENTS`.

    Returns:
        the last step it had done, 0 before its first; or `None` if it came to its end.
    """

    def wait_until(condition, seconds=0.02):
        while process.is_alive() and not condition():
            time.sleep(seconds)

    # What earlier kills left lies there until a checkpoint is whole.
    earlier = set(folder.glob("partial-*"))

    def step():
        try:
            return int((folder / "steps").read_text() or 0)
        except FileNotFoundError:
            return 0

    with ended_with_this_script(process):
        last = 0
        if moment == "starting":
            time.sleep(chance.uniform(0, LONGEST_START))
        else:
            wait_until(step)
            last = step() + chance.randrange(most_steps)
            wait_until(lambda: step() >= last)
        if moment == "writing":
            wait_until(lambda: set(folder.glob("partial-*")) - earlier, 0.001)
        time.sleep(chance.uniform(0, 0.02))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        finish(process)
        return None
    # The file may have been cut off.
    return max(step(), last)


def same(one, other):
    """Whether two files hold the same arrays, bit for bit."""
    import numpy as np

    with np.load(one) as first, np.load(other) as second:
        return sorted(first) == sorted(second) and all(
            first[name].tobytes() == second[name].tobytes() for name in first
        )


def soak(arguments):
    """Both runs; prints what came of them, and says whether all went as asked for."""
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": arguments.steps,
        "backend": arguments.backend,
        "steps_per_fit": arguments.steps_per_fit,
        "save_freq": arguments.save_freq,
    }
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        sys.exit(f"{folder} is of other settings: {kept.read_text()}. Choose another.")
    kept.write_text(json.dumps(settings))
    whole, parts = folder / "whole", folder / "parts"
    if not (whole / "end.npz").exists():
        finish(start(whole, arguments))
    log = folder / "log.jsonl"
    most_steps = int(max(LARGEST_SHARE * arguments.steps / arguments.kills, 1))
    kills = sum('"killed_at"' in line for line in log.read_text().splitlines())
    while not (parts / "end.npz").exists():
        chance, process = random.Random(kills), start(parts, arguments)
        if kills == arguments.kills:
            finish(process)
            continue
        moment = MOMENTS[kills % len(MOMENTS)]
        step = kill(process, parts, chance, most_steps, moment)
        if step is not None:
            left = len(list(parts.glob("partial-*")))
            kills += 1
            write(folder, {"run": "parts", "killed_at": step, "unfinished_files": left})
    equal = same(whole / "end.npz", parts / "end.npz")
    write(folder, {"kills": kills, "bit_identical": equal})
    print(f"{arguments.backend}: {arguments.steps} steps, {kills} kills, ", end="")
    print("bit-identical" if equal else "NOT the same")
    if kills < arguments.kills:
        print(
            f"The run ended before it was killed {arguments.kills} times. Take a new "
            "--folder, and more --steps or fewer --kills."
        )
    return equal and kills >= arguments.kills


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps-per-fit", type=int, default=50)
    parser.add_argument("--save-freq", type=int, default=20, help="steps")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended by SIGTERM."))
    sys.exit(not soak(arguments))


if __name__ == "__main__":
    main()
