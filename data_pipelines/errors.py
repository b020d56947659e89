"""The errors that data can cause. Each message names the file, member or key and says what to do."""


class DataError(ValueError):
    """A dataset, shard, index or tokenizer that cannot be used as asked."""
