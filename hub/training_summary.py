"""What a training did, counted from its record: steps, epochs, images. A recipe says only what was asked for."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from .wording import escape_markdown, plural


class TrainingSummary(NamedTuple):
    """What a training did, as run.json has it."""

    steps: int
    """The number of optimizer steps done."""
    per_epoch: int
    """The number of steps in one pass over the real images."""
    images: int
    """The number of different real images that were trained on."""
    generated: int
    """The number of different generated images that were trained on."""
    share: float
    """The share of each batch that was generated."""
    text: str
    """The sentence's part on how long it was, and where it ended before the recipe's end."""
    eps_share: Fraction
    """The share of the threat model's eps that the last step had; below 1 where eps was still growing."""

    def weights(self, chosen: dict[str, Any] | None) -> str:
        """Returns which weights were taken, by the entry ``weights`` of run.json; '' for a record without one."""
        if chosen is None:
            return ''
        whole = (chosen['epoch'] + 1) * self.per_epoch <= self.steps
        when = f'epoch {chosen["epoch"] + 1}' if whole else f'step {self.steps:,}'
        averaged = ', averaged' if chosen['of'] != 'model' else ''
        return f'weights of {when} (chosen by {escape_markdown(chosen["chosen_by"])}{averaged}), '


def training_summary(run: dict[str, Any]) -> TrainingSummary:
    """Returns what a finished run did, from the content of its run.json."""
    recipe, n = run['recipe'], run['data']['n']
    synthetic, batch = recipe.get('synthetic'), recipe['batch_size']
    made = round(batch * synthetic['fraction']) if synthetic else 0
    real = max(batch - made, 1)
    drop_last = recipe.get('drop_last') is not False  # None is what a run before this option has
    per_epoch = max(n // real if drop_last else -(-n // real), 1)
    asked = recipe['epochs'] * per_epoch
    steps = asked if run.get('steps') is None else run['steps']
    text = plural(recipe['epochs'], 'epoch')
    if steps != asked:
        why = ''
        if steps == recipe.get('max_steps'):
            why = ': it was to end after so many steps'
        elif recipe.get('patience'):
            why = f': {plural(recipe["patience"], "epoch")} had brought no better one on the held-out images'
        text = (f'{steps:,} {"step" if steps == 1 else "steps"}, {steps / per_epoch:.3g} of the {text} of the recipe'
                f'{why}')
    if run.get('resumed_from'):
        text += f', from step {run["resumed_from"]["step"]:,} of another run on'
    if recipe.get('init'):
        text += f', from weights: {escape_markdown(recipe["init"]["source"])}'
    warmup = round((recipe.get('eps_warmup_epochs') or 0) * per_epoch)
    return TrainingSummary(
        steps, per_epoch, min(steps * real, n) if steps <= per_epoch else n,
        min(synthetic['n'], steps * made) if synthetic else 0, made / batch, text,
        Fraction(min(steps, warmup), warmup) if warmup else Fraction(1))


def hardware_of(run: dict[str, Any]) -> str:
    """Returns what a run was trained on, and what its first steps were trained on where that was something else."""
    said: list[tuple[int, str]] = []
    for each in run.get('earlier') or ():
        text = f'{_machine(each)}, torch {each["versions"]["torch"]}'
        if said and said[-1][1] == text:
            said.pop()
        said.append((each['last_step'], text))
    if said and said[-1][1] == f'{_machine(run)}, torch {run["versions"]["torch"]}':
        said.pop()
    return _machine(run) + ''.join(f' (to step {step:,} on {text})' for step, text in said)


def _machine(session: dict[str, Any]) -> str:
    """Returns what a session was trained on; of a machine's GPUs those that it used, one for each process."""
    hardware = session['hardware']
    if hardware.get('gpu') and session.get('device', 'cuda') == 'cuda':
        return f'{session["processes"]} x {escape_markdown(hardware["gpu"].partition(" x ")[2] or hardware["gpu"])}'
    return f'{escape_markdown(hardware["cpu"])}, {plural(hardware["threads"], "thread")}'
