"""The layer in reading order: plan, routing, dispatch, experts, combine, balancing, moe; attention, norm."""
