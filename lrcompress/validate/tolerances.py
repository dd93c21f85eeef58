"""How far answers may be apart, per precision and kind of processor, relative to max(1, max|expected|).

Measured on real networks (ONNX Runtime 1.32, x86 with VNNI; cortex-a53, cortex-a76 and neoverse-n1 emulated):

    network            against               fp32      int8
    resnet20           torch fp32 on x86     2.7e-7    3.5e-2
                       x86 on ARM            2.5e-7    5.2e-8
    all-MiniLM-L6-v2   torch fp32 on x86     8.2e-6    0.71 tokens, 2.2e-2 sentence
                       x86 on ARM            1.9e-6    3.6e-2 tokens, 1.6e-2 sentence

Whole models, dense and at 60 % of their numbers (`tests/e2e/test_whole_models.py`), fp32 against torch on x86:

    resnet8            6.2e-7 on x86    4.8e-7 on cortex-a53 and -a76
    kws_dscnn          2.7e-7           4.1e-7
    char_step (LSTM)   5.8e-6           5.8e-6
    resnet20           3.1e-7           –
    silero_vad (ONNX)  0 to itself      6e-7

At fp32, kernels and processors differ in the order of a sum: 1e-4 is ten times the worst seen.

At int8 no fixed number is right. Ranges that are measured at run time turn a last bit into another rounding, and deep
networks amplify it: moving MiniLM's norms by 1e-7 moves its int8 sentence embedding by 1.9e-2 on one and the same
processor, as much as ARM does. What a model may differ from its fp32 self is therefore its own int8 distance, measured
when it is exported, times `INT8_SLACK`, plus the floor of the table. The same holds for 4 bits, whose activations are
rounded to int8 block by block, and for a plan's mixture; 16 bits only store what is computed in 32.
"""

from __future__ import annotations

TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"cpu": 1e-4, "arm64": 1e-4},
    "fp16": {"cpu": 1e-4, "arm64": 1e-4},
    "int8": {"cpu": 1e-3, "arm64": 1e-3},
    "int4": {"cpu": 1e-3, "arm64": 1e-3},
    "plan": {"cpu": 1e-3, "arm64": 1e-3},
}
INT8_SLACK = 2.0


def tolerances(precision: str, distance: float = 0.0) -> dict[str, float]:
    """Return the manifest's tolerances; `distance`: largest relative difference that quantization itself made."""
    slack = 0.0 if precision == "fp32" else INT8_SLACK * distance
    return {kind: slack + floor for kind, floor in TOLERANCES[precision].items()}
