"""The tables of what holds in PyTorch (docs/compatibility.md): each row says what the tests named here say."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import rnn_ext

TESTS = Path(__file__).parents[1]
README = TESTS.parent / "README.md"
PAGE = TESTS.parent / "docs" / "compatibility.md"
NOT_ON_A_GPU = "not yet run on a GPU"

# The beginning of each row: the tests of what it says, by their file.
CELL = {
    "an Elman cell": {
        "cell/test_numerics.py": ["output_and_gradients_are_as_accurate_as_eager"],
        "pytorch/test_operators.py": ["eager_calls_run_the_fused_operators_and_no_other"],
    },
    "`torch.compile`": {
        "pytorch/test_compile.py": [
            "the_compiled_function_gives_eager_results_without_graph_breaks",
            "compiled_cells_give_eager_results_without_graph_breaks",
            "compiled_graphs_contain_the_fused_operators_both_ways",
            "a_compiled_module_with_dynamic_sizes_is_compiled_once",
            "compiled_autograd_gives_eager_gradients",
        ]
    },
    "`torch.export`": {
        "pytorch/test_export.py": [
            "an_exported_cell_is_the_operator_and_takes_any_batch",
            "an_exported_cell_is_saved_loaded_and_trained",
            "an_exported_cell_is_transformed_as_the_cell",
            "an_exported_network_is_compiled_ahead_of_time_by_aotinductor",
            "a_cell_exported_to_onnx_gives_eager_results_for_any_batch",
        ]
    },
    "operators": {
        "pytorch/test_operators.py": [
            "the_forward_operator_is_registered_soundly",
            "the_backward_operator_is_registered_soundly",
            "the_operator_on_fake_tensors_predicts_shape_dtype_and_strides",
        ]
    },
    "second derivative": {
        "cell/test_gradients.py": [
            "second_derivatives_match_finite_differences",
            "every_entry_point_is_twice_differentiable",
        ]
    },
    "`torch.func`": {
        "pytorch/test_func.py": [
            "function_transforms_equal_eager",
            "vmap_never_takes_the_slow_path",
            "an_ensemble_equals_its_members_one_by_one",
            "transforms_nest_three_deep",
        ]
    },
    "autocast": {
        "pytorch/test_autocast.py": [
            "autocast_gives_nn_rnncells_dtypes",
            "a_compiled_cell_under_autocast_gives_what_an_eager_one_does",
        ]
    },
    "CUDA graphs": {
        "test_package.py": ["launches_neither_wait_nor_allocate_outside_pytorch"],
        "cell/test_cuda.py": [
            "forward_and_backward_are_captured_in_a_cuda_graph",
            "a_whole_training_step_of_the_module_is_captured",
        ],
    },
    "modules": {
        "pytorch/test_modules.py": [
            "state_dicts_load_both_ways",
            "a_copy_is_an_independent_cell_with_the_same_output",
            "meta_device_then_to_empty_gives_a_working_cell",
            "hooks_see_and_change_what_nn_rnncells_do",
            "parametrized_weights_train_as_in_nn_rnncell",
            "functional_call_uses_the_given_parameters",
            "swapped_tensors_are_used_by_the_next_call",
        ],
        "pytorch/test_common_modules.py": ["forward_equals_the_samples_reference_and_torch_nn"],
    },
    "conversion": {
        "pytorch/test_conversion.py": [
            "conversion_reaches_every_cell_and_rnn_and_nothing_else",
            "conversion_keeps_hooks_flags_and_attributes",
            "conversion_keeps_parametrizations",
            "the_inverse_undoes_the_conversion",
            "dynamic_quantization_works_after_the_inverse",
        ]
    },
    "checkpointing": {
        "pytorch/test_checkpointing.py": [
            "activation_checkpointing_gives_the_same_gradients",
            "saved_tensor_hooks_see_the_saved_tensors",
            "saving_on_the_cpu_gives_the_same_gradients",
            "in_place_change_of_a_saved_tensor_is_caught",
        ]
    },
    "DDP": {
        "pytorch/test_distributed.py": [
            "ddp_gradients_equal_one_processs",
            "fsdp_gradients_equal_one_processs_and_come_from_the_operators",
            "dtensors_with_a_sharded_batch_go_through_the_operators",
        ]
    },
    "type checkers": {
        "pytorch/test_tools.py": [
            "mypy_strict_accepts_uses_and_reports_misuses",
            "profiler_ranges_carry_the_operators_names",
            "the_flop_counter_counts_what_it_does_for_nn_rnncell",
        ]
    },
    "threads": {
        "pytorch/test_threads_and_forks.py": [
            "eight_threads_at_once_each_get_their_own_results",
            "the_forked_workers_of_a_data_loader_work_after_use_in_the_parent",
        ]
    },
}

SEQUENCES = {
    "every option": {
        "sequence/test_rnn.py": [
            "batches_give_what_nn_rnn_gives",
            "unbatched_input_gives_what_nn_rnn_gives",
            "packed_input_gives_what_nn_rnn_gives",
            "dropout_draws_nn_rnns_masks",
        ],
        "sequence/test_rnn_errors.py": ["wrong_calls_fail_in_the_words_of_nn_rnn", "what_nn_rnn_takes_is_taken"],
        "pytorch/test_common_modules.py": ["forward_equals_the_samples_reference_and_torch_nn"],
    },
    "rows of different lengths": {
        "sequence/test_rnn.py": ["lengths_do_what_packing_and_padding_do", "padding_may_be_nan_or_infinite"],
        "sequence/test_rnn_errors.py": ["wrong_lengths_are_value_errors_with_the_numbers"],
    },
    "nested tensors": {
        "sequence/test_rnn.py": [
            "nested_input_gives_what_lengths_give",
            "nested_input_is_neither_copied_nor_padded",
            "nested_input_of_few_or_equal_rows",
        ],
        "sequence/test_layer.py": ["a_flat_layer_equals_a_loop_of_cells", "a_nested_layer_is_a_jagged_one"],
        "sequence/test_layer_derivatives.py": ["derivatives_of_a_flat_layer_match_finite_differences"],
        "sequence/test_rnn_errors.py": ["wrong_nested_inputs_are_value_errors_with_the_numbers"],
    },
    "`torch.compile`": {
        "sequence/test_compiled_rnn.py": [
            "a_compiled_rnn_gives_eager_results_in_one_graph",
            "a_compiled_rnn_takes_lengths_in_one_graph",
            "a_compiled_rnn_takes_packed_input_in_one_graph",
            "a_compiled_rnn_takes_nested_input_in_one_graph",
            "a_compiled_rnn_through_inductor_gives_eager_results",
            "the_graph_still_breaks_at_nn_rnn_in_compiled_code",
        ],
        "pytorch/test_compile.py": [
            "a_compiled_module_with_dynamic_sizes_is_compiled_once",
            "the_graph_of_a_compiled_rnn_does_not_grow_with_the_steps",
            "compiled_autograd_gives_eager_gradients",
        ],
    },
    "`torch.export`": {
        "pytorch/test_export.py": [
            "an_exported_rnn_is_the_operator_and_takes_any_length_and_batch",
            "an_exported_network_is_compiled_ahead_of_time_by_aotinductor",
            "a_network_exported_to_onnx_holds_onnxs_rnn_and_takes_any_steps_and_batch",
            "an_rnn_exported_to_onnx_gives_eager_results",
        ]
    },
    "operators": {
        "pytorch/test_operators.py": [
            "the_layers_operator_is_registered_soundly",
            "the_layers_backward_operator_is_registered_soundly",
            "the_layer_on_fake_tensors_predicts_shapes_and_strides",
        ],
        "pytorch/test_export.py": ["make_fx_traces_the_layers_operators_both_ways"],
    },
    "derivatives": {
        "sequence/test_layer_derivatives.py": [
            "first_derivatives_match_finite_differences",
            "second_derivatives_match_finite_differences",
            "third_derivatives_equal_those_of_a_loop_of_cells",
        ]
    },
    "`torch.func`": {
        "sequence/test_rnn_modules.py": ["vmap_grad_and_jvp_give_what_a_loop_gives"],
        "pytorch/test_func.py": [
            "function_transforms_of_a_layer_equal_those_of_a_loop",
            "an_ensemble_equals_its_members_one_by_one",
        ],
    },
    "autocast": {
        "sequence/test_rnn_modules.py": [
            "autocast_gives_nn_rnns_dtypes_and_casts_weights_once",
            "autocast_reaches_every_kind_of_input",
        ]
    },
    "modules": {
        "sequence/test_rnn_modules.py": [
            "state_dicts_load_both_ways",
            "a_copy_is_an_independent_rnn_with_the_same_output",
            "an_old_pickle_loads",
            "hooks_see_and_change_what_nn_rnns_do",
            "to_and_to_empty_move_every_parameter",
            "weights_may_be_tied_between_layers_and_directions",
            "normed_and_pruned_weights_train_as_in_nn_rnn",
        ],
        "pytorch/test_modules.py": [
            "a_module_loads_with_weights_only",
            "a_spawned_process_runs_the_module_and_shares_its_parameters",
            "hooks_fire_on_the_way_there_and_back",
            "swapped_tensors_are_used_by_the_next_call",
        ],
    },
    "conversion": {
        "pytorch/test_conversion.py": [
            "conversion_reaches_every_cell_and_rnn_and_nothing_else",
            "conversion_keeps_the_parametrizations_of_an_rnn",
            "the_inverse_of_an_rnn_is_nn_rnn",
            "dynamic_quantization_works_after_the_inverse",
        ]
    },
    "checkpointing": {
        "sequence/test_rnn_modules.py": ["checkpointing_gives_the_same_gradients"],
        "sequence/test_layer_derivatives.py": [
            "an_in_place_change_of_what_is_saved_is_caught",
            "a_retained_graph_gives_the_same_gradients_again",
        ],
        "pytorch/test_checkpointing.py": [
            "saved_tensors_may_be_kept_elsewhere",
            "anomaly_mode_names_the_node_whose_gradient_is_nan",
        ],
    },
    "DDP": {
        "pytorch/test_distributed.py": [
            "ddp_gradients_equal_one_processs",
            "fsdp_gradients_equal_one_processs_and_come_from_the_operators",
            "dtensors_with_a_sharded_batch_go_through_the_operators",
        ]
    },
    "profiler": {
        "pytorch/test_tools.py": [
            "profiler_ranges_of_a_compiled_module_carry_the_operators_names",
            "the_flop_counter_counts_what_it_does_for_nn_rnn",
        ],
        "sequence/test_rnn_modules.py": ["the_eager_call_runs_the_operator_and_no_product_of_atens"],
        "pytorch/test_operators.py": ["deterministic_mode_changes_nothing"],
    },
    "threads": {
        "pytorch/test_threads_and_forks.py": [
            "eight_threads_at_once_each_get_their_own_results",
            "the_forked_workers_of_a_data_loader_work_after_use_in_the_parent",
        ]
    },
}


@pytest.fixture(scope="module")
def section() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


def tables(section: str) -> list[list[list[str]]]:
    """The cells of each table's rows, without its header."""
    found = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in t.splitlines()[2:]] for t in found]


def runs_on_the_cpu(file: str, name: str) -> bool:
    """Fails where the test isn't there, or is always skipped or expected to fail."""
    tree = ast.parse((TESTS / file).read_text())
    found = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == f"test_{name}"]
    assert len(found) == 1, f"{file} has no test_{name}"
    marks = [ast.unparse(d) for d in found[0].decorator_list]
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    marks += [ast.unparse(a.value) for a in assigned if ast.unparse(a.targets[0]) == "pytestmark"]
    assert not [m for m in marks if re.search(r"mark\.(skip|xfail)\b", m)], f"test_{name} of {file} is skipped"
    return not any(m.endswith("mark.cuda") for m in marks)


@pytest.mark.parametrize("number, expected", [(0, CELL), (1, SEQUENCES)], ids=["cell", "sequences"])
def test_every_row_of_the_tables_has_its_tests(section, number, expected):
    assert len(tables(section)) == 2
    rows = tables(section)[number]
    assert len(rows) == len(expected)
    for (capability, ours, *_), (beginning, tests) in zip(rows, expected.items(), strict=True):
        assert capability.startswith(beginning)
        on_the_cpu = [runs_on_the_cpu(file, name) for file, names in tests.items() for name in names]
        no_gpu_yet = "no GPU has run them" in README.read_text()
        assert ours == ("yes" if all(on_the_cpu) or not no_gpu_yet else NOT_ON_A_GPU)


@pytest.mark.parametrize(
    "module, shape", [(rnn_ext.RNNCell, (3, 4)), (rnn_ext.RNN, (6, 3, 4))], ids=["cell", "sequence"]
)
def test_the_python_of_the_section_lowers_a_program_to_aten(section, module, shape):
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"torch": torch, "program": torch.export.export(module(4, 5), (torch.zeros(shape),))}
    exec(textwrap.dedent(code), names)
    targets = [node.target for node in names["program"].graph.nodes if node.op == "call_function"]
    operators = [target for target in targets if hasattr(target, "namespace")]
    assert operators and all(target.namespace == "aten" for target in operators)


class WithRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = rnn_ext.RNN(4, 5)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_takes_a_model_with_an_rnn_after_the_inverse():
    model, x = WithRNN(), torch.randn(6, 3, 4)
    expected = model(x)
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only"):
        torch.jit.script(model)
    scripted = torch.jit.script(rnn_ext.convert(model, inverse=True))
    torch.testing.assert_close(scripted(x), expected)


@pytest.mark.filterwarnings("ignore:Was not able to save")
def test_a_graph_module_written_to_a_folder_loads_with_the_line_that_the_section_adds(section, tmp_path):
    model = nn.Sequential(rnn_ext.RNNCell(4, 5), nn.Tanh())
    torch.fx.symbolic_trace(model).to_folder(tmp_path, "Model")
    (line,) = re.findall(r"`(from rnn_ext[^`]*)`", section)
    names: dict = {"__name__": "module"}
    exec(f"{line}\n{(tmp_path / 'module.py').read_text()}", names)
    x = torch.randn(3, 4)
    torch.testing.assert_close(names["Model"]()(x), model(x))


def test_every_footnote_of_the_table_is_there_with_a_link(section):
    notes = dict(re.findall(r"^\[\^(\w+)\]: (.*)$", section, re.MULTILINE))
    assert set(notes) == set(re.findall(r"\[\^(\w+)\](?!:)", section))
    assert all("](https://" in note for note in notes.values())
