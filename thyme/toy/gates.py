"""Teacher-forced gates of the base stage: does the model see? No decoding, so a check costs one forward pass."""

from collections.abc import Sequence

import torch

from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.toy.captions import Caption
from thyme.train.objective import trained_logits
from thyme.train.packing import Sample, pack
from thyme.train.tokenization import supervised_sample


def caption_sample(processor: Processor, caption: Caption) -> Sample:
    """The supervised sample of one caption."""
    prompt_ids = processor.encode(processor.chat(caption.prompt))
    return supervised_sample(processor, prompt_ids, caption.text, [processor.preprocess(caption.image)])


class CaptionGate:
    """Share of digits of held-out captions that the model predicts right given the true text before, by kind.

    All that a caption says about its picture is in its digits: what is read, and in which column and row it stands.
    """

    def __init__(self, processor: Processor, heldout: Sequence[Caption]) -> None:
        digits = {processor.encode(str(digit))[0] for digit in range(10)}
        self._digits = torch.tensor(sorted(digits))
        kinds = sorted({caption.kind for caption in heldout})
        self._batches = {
            kind: pack(
                [caption_sample(processor, caption) for caption in heldout if caption.kind == kind],
                image_token_id=processor.image_token_id,
            )[0]
            for kind in kinds
        }

    @torch.no_grad()
    def __call__(self, model: Model) -> dict[str, float]:
        """Kind -> accuracy in [0, 1]."""
        accuracy = {}
        for kind, batch in self._batches.items():
            batch = batch.to(model.device)
            is_digit = torch.isin(batch.targets, self._digits.to(model.device))
            predicted = trained_logits(model, batch).argmax(-1)
            accuracy[kind] = float((predicted == batch.targets)[is_digit].float().mean())
        return accuracy
