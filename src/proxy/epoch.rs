//! Identifies the generation of the configuration that an exchange uses.

/// Identifies one generation. The number of its holders is counted.
#[derive(Debug)]
pub struct Epoch {
    /// The generation's number: 1 for the first configuration of this process.
    pub number: u64,
}
