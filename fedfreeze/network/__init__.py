"""The network: cut into blocks, an output module for the missing ones, the stage that trains, its flat buffer."""
