"""The ops by themselves, on tensors of yours: Triton on a GPU, C++ or torch on a CPU, the same call.

    python examples/call_an_op.py

Draws a token for each row, each at its own temperature, then takes the GRPO loss of those tokens and its gradient.
"""

import torch

from thyme.kernels.grpo_loss import grpo_loss
from thyme.kernels.sample import sample


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logits = torch.randn(6, 1000, device=device, requires_grad=True)  # 6 tokens, a vocabulary of 1000

    # Rows 0 to 2 are text, at temperature 1; rows 3 to 5 are code, greedy. A row's draw depends on nothing but itself.
    temperature = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], device=device)
    seed = torch.full((6,), 42, device=device)
    drawn = sample(logits.detach(), temperature, seed=seed, position=torch.arange(6, device=device))
    print("tokens          ", drawn.token.tolist())
    print("largest logits  ", logits.argmax(dim=1).tolist())
    print("log-probability ", [round(value, 3) for value in drawn.logprob.tolist()])

    # One policy step over them. A weight of 0 (a prompt, an image, what the sandbox printed) costs nothing at all.
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], device=device) / 4
    advantages = torch.tensor([0.7, 0.7, 0.7, -1.2, -1.2, -1.2], device=device)
    old = torch.where(temperature > 0, drawn.logprob, drawn.logprob_raw)  # greedy tokens: at temperature 1
    loss, metrics = grpo_loss(logits, drawn.token, advantages, weights, old_logprobs=old, temperature=temperature)
    loss.backward()
    print(f"loss             {loss.item():.4f}")
    for name, value in zip(metrics.names, metrics.values.tolist(), strict=True):
        print(f"    {name:<24} {value:.4f}")
    assert logits.grad is not None
    print("gradient by row ", [round(value, 4) for value in logits.grad.norm(dim=1).tolist()])


if __name__ == "__main__":
    main()
