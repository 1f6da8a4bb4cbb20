"""A tracker that writes a text file. Copied into qtune/train/trackers by test_a_tracker."""

from pathlib import Path

from qtune.train.trackers import Tracker


def in_a_file():
    from transformers import TrainerCallback

    class Diary(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.write("dear diary")

        def on_log(self, args, state, control, logs=None, **kwargs):
            for name in ("loss", "eval_loss"):
                if name in logs:
                    self.write(f"{state.global_step} {name} {logs[name]}")

        def on_train_end(self, args, state, control, **kwargs):
            self.write("good night")

        def write(self, line):
            with Path("diary.txt").open("a", encoding="utf-8") as file:
                print(line, file=file)

    return Diary()


TRACKER = Tracker(name="diary", callback=in_a_file)
