"""ONNX with the factors kept separate and adapters as optional inputs.

`graph` traces the live module (never a reloaded one) without the exporter's optimizer, which folds and renames
factors; `slots` turns adapter tensors into inputs with a rank-0 default; `gates` refuses a graph that lost a name, a
byte, a factor or an answer; `quantize` hands the rest to ONNX Runtime's tools; `payloads` turns adapters into what
the slots take.
"""
