#!/usr/bin/env python3
"""The MoE layer of OLMoE in torch (transformers' own block), for benches/moe_layer.py.

Reads lines "DTYPE IMPL WHAT TOKENS" (float32|bfloat16, grouped_mm|eager, forward|both, a number) and answers each with
the seconds of one run, after one that is not counted. "memory" answers in GB: the peak of the process, what was resident
after the imports, parameters with their gradients.
"""
import resource
import sys
import time

import torch
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

GB = 1e9
imported = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / GB
torch.set_num_threads(2)
torch.manual_seed(1)
config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8)
block, stored, warm = None, None, set()
for line in sys.stdin:
    if line.strip() == "memory":
        held = 2 * sum(parameter.nbytes for parameter in block.parameters()) / GB
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, imported, held, flush=True)
        continue
    dtype, impl, what, tokens = line.split()
    if stored != dtype:
        block = None
        config._experts_implementation = impl
        block = OlmoeSparseMoeBlock(config).to(getattr(torch, dtype))
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        stored = dtype
    block.experts.config._experts_implementation = impl
    x = torch.randn(1, int(tokens), 2048).to(getattr(torch, dtype))

    def run():
        if what == "forward":
            with torch.inference_mode():
                block(x)
            return
        x.requires_grad_(True)
        x.grad = None
        for parameter in block.parameters():
            parameter.grad = None
        y = block(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))

    if line not in warm:
        warm.add(line)
        run()
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, flush=True)
    x = None
    for parameter in block.parameters():
        parameter.grad = None
