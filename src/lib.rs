//! Forebay: an edge gateway on Pingora.
//!
//! The modules, in the order in which they are best read: what words mean, what was written, what is counted, then the
//! way of a request from the client through the filters to an upstream, and last how all of it is put together.

pub mod access_log;
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
pub mod spans;
pub mod upkeep;
pub mod upstream;
