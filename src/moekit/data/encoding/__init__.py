"""From columns of examples to the arrays that stems and heads read, and from answers back to words."""
