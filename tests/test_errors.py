import inspect
import re

from moeplace import errors


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Class name -> names of its bases, as the docstring of the module draws them."""
    tree: dict[str, tuple[str, ...]] = {"MoeplaceError": ("Exception",)}
    path = ["MoeplaceError"]
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        found = re.match(r"^ *([│ ]*)[├└]── (\w+)(?: \((\w+)\))?  +\S", line)
        if found:
            depth = len(found[1]) // 4 + 1
            path[depth:] = [found[2]]
            tree[found[2]] = (path[depth - 1], *([found[3]] if found[3] else []))
    return tree


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    classes = {
        name: tuple(base.__name__ for base in kind.__bases__)
        for name, kind in inspect.getmembers(errors, inspect.isclass)
    }
    drawn = drawn_tree()
    assert len(drawn) == 9
    # a child of ProblemError need not repeat that it is a ValueError
    drawn["PolicyNotApplicable"] = tuple(
        b for b in drawn["PolicyNotApplicable"] if b != "ValueError"
    )
    assert drawn == classes


def test_every_error_can_be_caught_as_one() -> None:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.MoeplaceError)


def test_bad_input_is_a_value_error_and_a_missing_extra_an_import_error() -> None:
    for kind in (errors.ProblemError, errors.PlanError, errors.FormatError):
        assert issubclass(kind, ValueError)
    assert issubclass(errors.PolicyNotApplicable, errors.ProblemError)
    assert issubclass(errors.MissingExtraError, ImportError)
    assert not issubclass(errors.SolverError, ValueError)
    assert not issubclass(errors.CertificateError, ValueError)
