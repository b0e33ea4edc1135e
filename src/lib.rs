//! Forebay: an edge gateway on Pingora.
//!
//! The modules stand in the order in which they are best read, from the vocabulary to the programs.
//!
//! Eight files show one request from accept to log line: `client/acceptor.rs` accepts the connection, `client.rs`
//! keeps it, `client/head.rs` reads the request header, `client/driver.rs` decides who runs the exchange, `proxy.rs`
//! names its phases, `proxy/select.rs` chooses the endpoint, `client/driver/attempt.rs` exchanges request and response
//! with it, and `proxy/finish.rs` records the result.

// The vocabulary: phases, parties, refusals.
pub mod error;
pub mod party;
pub mod phase;

// What an operator writes.
pub mod config;
pub mod expression;

// The client, the bodies and the phases of an exchange, and the endpoint.
pub mod body;
pub mod client;
pub mod filter;
pub mod framing;
pub mod proxy;
pub mod upstream;

// What exchanges share: the time of a worker, memory, disk.
pub mod account;
pub mod eventloop;
pub mod scheduler;
pub mod slow_client;
pub mod spool;

// What is shown of an exchange.
pub mod access_log;
pub mod finished;
pub mod metrics;
pub mod recorder;
pub mod spans;

// The process: its parts, its certificates, its operator.
pub mod acme;
pub mod admin;
pub mod gateway;

// The command line, and the programs besides the gateway.
pub mod cli;
pub mod import;
pub mod origin;

// Tools.
pub mod files;
pub mod net;
pub mod printable;
pub mod upkeep;
