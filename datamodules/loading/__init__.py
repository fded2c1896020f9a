"""How rows reach the trainer: which of them a rank takes, in which order, through which workers, as which token ids."""
