"""Code that runs inside an engine: policies for vLLM, SGLang and vllm-ascend.

Nothing here ever raises into the engine, reads a clock to plan, or compiles. All ranks act on one
decision (see `agree`). `policy` holds what the engines share; each has a module of its own.
"""
