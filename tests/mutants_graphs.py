"""Faults in reading, fitting and rewriting ONNX graphs, and in what ssh is given, for `tests/mutants.py`."""

from __future__ import annotations

_F, _O, _S = "test_onnx_factorize", "test_onnx_opening", "test_ssh"
_B, _H, _D = "test_graph_bits", "test_shrinkage", "test_device_plan"

#: (file in lrcompress, text, what it becomes, file in tests/contracts, which of its tests to run)
GRAPH_FAULTS: list[tuple[str, str, str, str, str]] = [
    # what is refused
    ("graphs/opening.py", "file = contained(path.parent, place)", "file = path.parent / place", _O, "elsewhere"),
    ("graphs/opening.py", "offset + length > size", "length > size", _O, "elsewhere"),
    ("graphs/opening.py", "offset < 0 or length != wanted", "offset < 0", _O, "elsewhere"),
    ("graphs/opening.py", "if node.domain not in DOMAINS:", "if False:", _O, "says_where"),
    ("graphs/opening.py", "            if name in own:\n", "            if False:\n", _O, "says_where"),
    ("graphs/opening.py", "if version > newest:", "if version > newest + 100:", _O, "says_where"),
    ("graphs/opening.py", "dim.dim_value < 1 and what", "dim.dim_value < 0 and what", _O, "says_where"),
    ("graphs/layers.py", "use.weight in self.fed and not self.listed", "False", _O, "may_be_fed"),
    ("graphs/layers.py", "if use.scope.looped:", "if False:", _O, "must_stay"),
    ("graphs/layers.py", "if reason is None and len(sharing) > 1:", "if False:", _O, "must_stay"),
    # what is read
    ("graphs/moments.py", "product - np.outer(total, total) / len(rows)", "product", _F, "cancellation or read"),
    ("graphs/moments.py", "(self.count * other.count / n)", "(other.count / n)", _F, "cancellation"),
    ("graphs/moments.py", 'geometry.auto == "upper"', 'geometry.auto == "lower"', _F, "torch_says_they_read"),
    ("graphs/moments.py", "1, 1 + axes)  #", "1, -1)  #", _F, "torch_says_they_read"),
    ("graphs/moments.py", "yield rows if keep is None else rows[keep]", "yield rows", _F, "padding"),
    ("graphs/fitting.py", "% layer.shape[0]  #", "% (layer.shape[0] + 1)  #", _F, "both_directions"),
    ("graphs/running.py", "if attribute.g is branch:", "if attribute.g is not branch:", _F, "inside_branches"),
    ("graphs/running.py", "np.moveaxis(value, 0, axis)", "np.moveaxis(value, axis, 0)", _F, "batch_axis"),
    # what is fitted
    ("graphs/forms.py", "p = _top(w @ s @ w.T, rank)", "p = _top(w @ w.T, rank)", _F, "theory or torch"),
    ("graphs/forms.py", "p, _ = np.linalg.qr(b @ _top(b.T @ b, rank))", "p, _ = np.linalg.qr(w @ _top(b.T @ b, rank))", _F, "theory or torch"),
    ("graphs/forms.py", "inverse @ _top(np.einsum", "half @ _top(np.einsum", _F, "forms_are"),
    ("graphs/forms.py", "core = (inverse @ x @ p).T", "core = (x @ p).T", _F, "forms_are"),
    ("graphs/forms.py", "u * share, v / share", "u * share, v", _F, "full_rank"),
    ("graphs/fitting.py", "_old_bias(graph, layer) + error @", "_old_bias(graph, layer) - error @", _F, "mean_residual"),
    ("graphs/fitting.py", "w @ drift.mean - made @ drift.drifted_mean if shifts", "w @ drift.mean - made @ drift.mean if shifts", _F, "makes_up"),
    ("graphs/fitting.py", "(w @ (cross - s)).T).T", "(w @ (s - cross)).T).T", _F, "makes_up"),
    ("graphs/fitting.py", "losses[0] < (1 - _WORTH_A_BIAS) * losses[1]", "True", _F, "pays_only"),
    ("graphs/planning.py", "if at[name] == i and cost <= left:", "if at[name] == i:", _F, "ratio_is_kept"),
    ("graphs/planning.py", "if least > budget:", "if False:", _F, "ratio_is_kept"),
    ("graphs/planning.py", "_slope(best[-2], best[-1]) <= _slope(best[-1], o)", "_slope(best[-2], best[-1]) > _slope(best[-1], o)", _F, "convex"),
    # what is written
    ("graphs/rewriting.py", 'a for a in node.attribute if a.name != "group"', 'a for a in node.attribute if a.name == "kernel_shape"', _F, "full_rank"),
    ("graphs/rewriting.py", "{k: a.T for k, a in arrays.items()} if layer.kind", "{k: a for k, a in arrays.items()} if layer.kind", _F, "full_rank"),
    ("graphs/rewriting.py", "_unread(self.graph.model.graph))\n        return", "set())\n        return", _F, "nothing_ever_read"),
    ("graphs/rewriting.py", "self.model.ir_version = 4", "pass", _F, "old_files"),
    ("graphs/checkpoint.py", "if found != recorded:", "if False:", _F, "told_apart"),
    ("graphs/checkpoint.py", "str(8 + size + start)", "str(size + start)", _F, "as_typed"),
    ("graphs/checkpoint.py", "if opened.digest != source", "if False and opened.digest != source", _F, "told_apart"),
    # fewer bits
    ("export/products.py", "found |= inner_reads(inner)", "pass", _B, "branch"),
    ("export/products.py", "graph.input} | inner_reads(graph)", "graph.input}", _B, "branch"),
    ("export/quantize.py", "    read |= inner_reads(graph)\n", "", _B, "branch"),
    ("export/quantize.py", "for o in graph.output} | inner_reads(graph)", "for o in graph.output}", _B, "branch"),
    ("export/quantize.py", "(n < _MIN_CONSTANT or not four)", "n < _MIN_CONSTANT", _B, "opset"),
    ("export/quantize.py", "constants.IR if four else 0", "0", _B, "opset"),
    ("export/quantize.py", "if source in by_name}, **by_name}", "if False}, **by_name}", "test_quantize", "both_places"),
    ("export/int8.py", "nodes_to_quantize=[*convs, *_cuts(model.graph, convs)]", "nodes_to_quantize=list(convs)", _B, "cut"),
    ("export/int8.py", "return low <= 0 <= high and", "return low <= high and", _B, "cut"),
    ("export/int8.py", "low - (high - low)", "low", _B, "room"),
    ("export/int8.py", '"TensorQuantOverrides": ranges', "", _B, "room"),
    ("export/packing/halves.py", "order.get(n, -1)", "order.get(n, len(order))", _B, "branch"),
    ("verbs/export_graph.py", "np.array_equal(a, golden", "True or np.array_equal(a, golden", _B, "opset"),
    # few positions
    ("shrinkage.py", "if not 0 < count < p:", "if True:", _H, ""),
    ("shrinkage.py", "(count + 1 - 2 / p)", "(p + 1 - 2 / p)", _H, "share"),
    ("factorize/_types.py", "(rho * trace / p)[..., None, None]", "(rho * trace)[..., None, None]", _H, "not_seen or readers"),
    ("factorize/_anchor.py", "cross=kept * self.cross + more * w", "cross=kept * self.cross", _H, "without_drift"),
    ("calibrate/collected.py", "made[keys] = count, mean, shrunk(second, count)", "made[keys] = count, mean, second", _H, "readers"),
    ("calibrate/collected.py", "output = shrunk(self.outputs.pop(layer.name).div_(count).cpu(), count)", "output = self.outputs.pop(layer.name).div_(count).cpu()", _H, "last_layer"),
    ("graphs/moments.py", "(kept * m + eye for m", "(kept * m for m", _H, "drift"),
    ("verbs/budgeting.py", 'copies=len({kinds[n] == "embedding"', 'copies=len({True or kinds[n] == "embedding"', _D, "just_meets"),
    ("plan/candidates.py", "precisions(bits if layer.may_be_rounded else (32,))", "precisions(bits if layer.reason is None else (32,))", _D, "just_meets"),
    # what ssh is given
    ("validate/targets/ssh.py", '[*words, "--", self.host,', "[*words, self.host,", _S, "one_connection or nothing_stays or names_that"),
    ("validate/targets/ssh.py", '"BatchMode=yes", ', "", _S, "nothing_stays"),
    ("validate/targets/ssh.py", "found = _TARGET.fullmatch(detail)", "found = _TARGET.match(detail)", _S, "never_reaches"),
    ("validate/targets/ssh.py", 'if python.startswith("-"):', "if False:", _S, "never_reaches"),
    ("validate/targets/ssh.py", 'int(found["port"]) < 65536', 'int(found["port"]) < 99999', _S, "never_reaches"),
    ("validate/targets/ssh.py", "if line == remote_runner.MARK:", "if True:", _S, "nothing_stays"),
    ("validate/targets/ssh.py", "timeout=_TIMEOUT_S, ", "", _S, "given_up"),
    ("validate/remote_runner.py", 'version(here["onnxruntime"]) < version(limits["min"])', "False", _S, "or_with_another"),
    ("validate/__init__.py", "answers.cpu_class or cpu_class(target)", "cpu_class(target)", _S, "arm_board"),
]  # fmt: skip
