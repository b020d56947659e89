"""What lies on the disk: shards with their indices, a dataset that opens and checks them, folders that are whole."""
