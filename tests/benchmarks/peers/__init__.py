"""Other methods in one harness: same checkpoint, calibration data, evaluation and axis for every row.

ranks.py      pure functions from spectra and a budget to ranks: uniform, 1/log L, Lagrangian, knapsack, EVBMF
networks.py   the two networks, their calibration draws, budgets and evaluation
drift.py      what a pass through two networks tells: moments of clean and drifted inputs, loss of one change
formulas.py   rows written from formulas, on the package's own decompositions where these are the same mathematics
foreign.py    rows of packages that really run, in an environment of their own
runtime.py    dense rows, int8 and int4 by ONNX Runtime, and every row's way into one ONNX file
rows.py       the list of rows; worker.py runs one of them in a process of its own; table.py prints and plots
"""
