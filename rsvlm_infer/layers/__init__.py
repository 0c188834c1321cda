"""The parts of the model as nn.Modules: they own weights and call ops, never a kernel."""
