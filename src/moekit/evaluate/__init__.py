"""How good, how fast, how balanced: metrics, comparisons with dense twins, cost accounting and reports."""
