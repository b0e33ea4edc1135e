//! What tells which generation of the configuration an exchange goes by.

/// Which generation something belongs to. What holds it is counted.
#[derive(Debug)]
pub struct Epoch {
    /// How many configurations there have been in this process, with this one.
    pub number: u64,
}
