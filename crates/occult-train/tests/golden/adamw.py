"""Writes adamw.json with torch.optim.AdamW: python3 adamw.py > adamw.json"""
import json
import torch

torch.manual_seed(0)
config = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
weight = torch.nn.Parameter(torch.randn(11))
start = weight.detach().tolist()
rates = [1e-2, 9e-3, 5e-3, 1e-3, 1e-3, 1e-4]
optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False, fused=False)
gradients, weights = [], []
for t, rate in enumerate(rates):
    gradient = torch.randn(11) * 10.0 ** (t - 3)
    gradient[0] = 0.0
    weight.grad = gradient
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    gradients.append(gradient.tolist())
    weights.append(weight.detach().tolist())
state = optimizer.state[weight]
print(json.dumps({"config": config, "rates": rates, "start": start, "gradients": gradients, "weights": weights,
                  "mean": state["exp_avg"].tolist(), "square": state["exp_avg_sq"].tolist()}))
