"""The tool of recipes/tools.sh, and the pattern for one of your own (docs/tools.md)."""

from verl.tools.function_tool import function_tool

from cppo_verl.quickstart.calculator import evaluate


@function_tool
def calculator(expression: str) -> str:
    """Compute a sum of whole numbers.

    Args:
        expression: whole numbers with + and - between them, such as "12+7-3".
    """
    return str(evaluate(expression))
