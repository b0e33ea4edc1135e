//! The integration tests: stories of an origin, the gateway and a client over real sockets.
//!
//! One module a phase, named like it, and a few for what crosses phases. [`harness`] holds the actors.

mod harness;

mod accept;
mod actors;
mod balance;
mod bench;
mod boards;
mod breaker;
mod buffer;
mod churn;
mod cli;
mod config;
mod connect;
mod deadline;
mod discovery;
mod endings;
mod eventloop;
mod filters;
mod finish;
mod grpc;
mod half_close;
mod handshake;
mod header;
mod health;
mod imports;
mod mirror;
mod observe;
mod origin;
mod pace;
mod page;
mod proxy_protocol;
mod proxying;
mod queue;
mod receive;
mod relay;
mod retry;
mod route;
mod select;
mod send;
mod slow;
mod spans;
mod spool;
mod status;
mod sticky;
mod stop;
mod story;
mod timeline;
mod top;
mod trace;
mod transport;
mod upstreams;
mod wait;
mod write;
