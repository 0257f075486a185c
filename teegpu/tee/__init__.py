"""The trusted side: prompt, norms, rotary, softmax, SiLU, KV cache, sampling; products go out as programs."""
