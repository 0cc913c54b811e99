"""The only process with records: policy, ledger, mechanisms, log. It opens no socket."""
