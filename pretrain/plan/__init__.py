"""What a run will need, worked out before a GPU is touched: `pretrain.plan.estimate.make_plan`."""
