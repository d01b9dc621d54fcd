"""A probe's scores from the reference pass that training makes anyway: prompt positions see nothing of the answer.

Shape suffixes: B rows, L tokens of the padded batch, N response tokens, E examples, F features.
"""

from collections.abc import Callable, Sequence

import torch

from safeshape.data import prompt_spans
from safeshape.signals.probes import Probe, pooled
from safeshape.types import IGNORE, MicroBatch


def reader(probe: Probe) -> Callable[[Sequence[torch.Tensor], MicroBatch], torch.Tensor]:
    """What reads p_safe (N,) of the response tokens off the hidden states of all layers.

    The tokens of an example's last turn take the probe's score of the prompt before it; earlier turns keep theirs.
    Equal to `Probe.p_safe` of the prompts to float rounding, where the chat template's generation prompt is how the
    answer begins in the rendered row.
    """

    def read(states: Sequence[torch.Tensor], batch: MicroBatch) -> torch.Tensor:
        labels_BL = torch.nn.functional.pad(batch.labels_BT, (1, 0), value=IGNORE)
        p_safe_BT = batch.p_safe_BT.clone().to(states[0].device)
        for row, begin, end, last in prompt_spans(labels_BL, batch.begins_BL):
            x_F = torch.cat([pooled(states[layer][row, begin:end], probe.pooling) for layer in probe.layers])
            # The token at position t is predicted at t - 1.
            p_safe_BT[row, end - 1 : last - 1] = probe.p_safe_of(x_F[None])[0]
        return p_safe_BT[batch.counted_BT.to(p_safe_BT.device)]

    return read
