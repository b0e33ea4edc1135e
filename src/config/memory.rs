//! `resources.memory`: a size, or `auto`.
//!
//! `auto` is a fraction of the lowest memory limit of the process's cgroup and its parents, in either version of
//! cgroups; without a limit, of the memory of the machine.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::units::Size;

/// `auto` is a quarter. The rest is for connections, the allocator and socket buffers of the kernel.
const PART: u64 = 4;

/// The least value of `auto`, also used if the memory is unknown.
const LEAST: Size = Size::kib(16 * 1024);

/// The forms of the value.
pub enum Memory {}

impl JsonSchema for Memory {
    fn schema_name() -> Cow<'static, str> {
        "Memory".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let size = generator.subschema_for::<Size>();
        json_schema!({
            "description": "`auto`, a quarter of what the cgroup or the machine has, or a size such as `512MiB`",
            "anyOf": [{ "const": "auto" }, size],
        })
    }
}

/// Deserializes a size, or computes `auto`.
pub fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
    struct Written;
    impl Visitor<'_> for Written {
        type Value = Size;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("`auto` or a size such as `512MiB`")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
            if text == "auto" { Ok(auto()) } else { Size::deserialize(de::value::StrDeserializer::new(text)) }
        }
    }
    deserializer.deserialize_any(Written)
}

/// The value of `auto` on this machine.
fn auto() -> Size {
    let text = |path: &Path| fs::read_to_string(path).ok();
    let limit = text(Path::new("/proc/self/cgroup")).and_then(|own| lowest(&own, text));
    let whole = || text(Path::new("/proc/meminfo")).as_deref().and_then(total);
    limit.into_iter().chain(whole()).min().map_or(LEAST, |most| Size((most / PART).max(LEAST.0)))
}

/// The memory of the machine, from `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest limit for a process with this content of `/proc/self/cgroup`.
fn lowest(own: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut limits = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|one| one == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // In a cgroup namespace the path may be that of the host; the limit is then at the root.
        let group = PathBuf::from(root).join(group.trim_start_matches('/'));
        let above = group.ancestors().take_while(|path| path.starts_with(root));
        limits.extend(above.filter_map(|path| read(&path.join(file))?.trim().parse::<u64>().ok()));
    }
    limits.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(own: &str, files: &[(&str, &str)]) -> Option<u64> {
        lowest(own, |path| files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).to_owned()))
    }

    #[test]
    fn the_lowest_limit_on_the_way_to_the_root_holds() {
        let files = [
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/memory.max", "1073741824\n"),
            ("/sys/fs/cgroup/memory.max", "4294967296\n"),
        ];
        assert_eq!(of("0::/a/b\n", &files), Some(1 << 30));
        assert_eq!(of("0::/a/b\n", &files[..1]), None, "no limit at all");
        assert_eq!(of("0::/../../elsewhere\n", &files[2..]), Some(4 << 30), "a path of another namespace");
    }

    #[test]
    fn the_first_version_has_a_file_of_another_name() {
        let own = "5:cpu,cpuacct:/x\n4:memory:/pod/c\n1:name=systemd:/y\n";
        let files = [
            ("/sys/fs/cgroup/memory/pod/c/memory.limit_in_bytes", "536870912"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
        ];
        assert_eq!(of(own, &files), Some(512 << 20));
        assert_eq!(of("what is this", &files), None);
    }

    #[test]
    fn a_size_is_read_as_anywhere_and_auto_is_one() {
        let size = |text: &str| read(serde_yaml::Deserializer::from_str(text)).map_err(|error| error.to_string());
        assert_eq!(size("300MiB"), Ok(Size(300 << 20)));
        assert!(size("auto").expect("a size") >= LEAST);
        assert!(size("7").expect_err("no unit").contains("`auto` or a size"));
        assert!(size("much").is_err());
        assert_eq!(total("MemTotal:       16 kB\nMemFree: 1 kB"), Some(16_384));
    }
}
