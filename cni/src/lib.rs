//! The CNI plugin: parse, ask the agent, print; and its installer.
