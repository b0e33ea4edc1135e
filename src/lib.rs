//! Forebay: an edge gateway on Pingora.
//!
//! The modules, in suggested reading order: vocabulary, configuration, metrics, then the path of a request from the
//! client through the filters to an upstream, and finally the assembly of everything.

pub mod access_log;
pub mod account;
pub mod acme;
pub mod admin;
pub mod cli;
pub mod client;
pub mod config;
pub mod error;
pub mod eventloop;
pub mod expression;
pub mod files;
pub mod filter;
pub mod finished;
pub mod framing;
pub mod gateway;
pub mod import;
pub mod metrics;
pub mod net;
pub mod origin;
pub mod party;
pub mod phase;
pub mod printable;
pub mod proxy;
pub mod recorder;
pub mod scheduler;
pub mod slow_client;
pub mod spans;
pub mod spool;
pub mod upkeep;
pub mod upstream;
