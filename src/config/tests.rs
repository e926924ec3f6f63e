//! Tests of the settings: every source, their precedence, and the messages of mistakes.

use std::path::Path;

use super::*;

fn load(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("thalweg.toml");
    std::fs::write(&path, file).expect("a file in it");
    let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let flags: Vec<(&str, String)> = flags.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
    Config::load(Some(&path), environment, &flags)
}

#[test]
fn precedence_is_flag_environment_file_default() {
    let file = "http = \"127.0.0.1:1\"\ngrpc = \"127.0.0.1:2\"\npostgres = \"127.0.0.1:3\"\n";
    let environment = [("THALWEG_GRPC", "127.0.0.1:12"), ("THALWEG_POSTGRES", "127.0.0.1:13")];
    let config = load(file, &environment, &[("postgres", "off")]).expect("all of it is valid");
    assert_eq!(config.http, Listen::at("127.0.0.1:1"));
    assert_eq!(config.grpc, Listen::at("127.0.0.1:12"));
    assert_eq!(config.postgres.address(), None);
    assert_eq!(config.series_limit, Config::default().series_limit);
}

#[test]
fn values_are_read_in_their_text_form() {
    fn check(file: &str, expected: impl Fn(&mut Config)) {
        let mut want = Config::default();
        expected(&mut want);
        assert_eq!(load(file, &[], &[]).expect(file), want, "{file}");
    }
    check("", |_| {});
    check("memory_limit = \"512MiB\"", |c| c.memory_limit = Bytes(512 << 20));
    check("memory_limit = 1000", |c| c.memory_limit = Bytes(1000));
    check("flush_interval = \"90s\"", |c| c.flush_interval = Seconds(90.0));
    check("flush_interval = 0.5", |c| c.flush_interval = Seconds(0.5));
    check("query_timeout = \"250ms\"", |c| c.query_timeout = Seconds(0.25));
    check("standard_ports = \"off\"", |c| c.standard_ports = Switch(false));
    check("standard_ports = false", |c| c.standard_ports = Switch(false));
    check("http = \"[::1]:7300\"", |c| c.http = Listen::at("[::1]:7300"));
    check("insecure = true\nhttp = \"0.0.0.0:7300\"", |c| {
        c.insecure = Switch(true);
        c.http = Listen::at("0.0.0.0:7300");
    });
    check("retention = \"400d\"", |c| c.retention = Seconds(400.0 * 86400.0));
    check("http = \"0.0.0.0:7300\"\ngrpc = \"[::]:4317\"\nauth_file = \"/x\"", |c| {
        c.http = Listen::at("0.0.0.0:7300");
        c.grpc = Listen::at("[::]:4317");
        c.auth_file = "/x".to_owned();
    });
    check("log_format = \"json\"", |c| c.log_format = LogFormat::Json);
    let exports = |c: &mut Config| {
        c.export_locations = Texts(["/a/b", "s3://x/y?region=r"].map(str::to_owned).to_vec());
    };
    check("export_locations = [\"/a/b\", \"s3://x/y?region=r\"]", exports);
    check("export_locations = \"/a/b; s3://x/y?region=r\"", exports);
    check("export.locations = [\"/a/b\", \"s3://x/y?region=r\"]", exports);
    check("[export]\nlocations = [\"/a/b\", \"s3://x/y?region=r\"]\n", exports);
    check("export_locations = []", |_| {});
    let variable = load("", &[("THALWEG_EXPORT_LOCATIONS", "/a/b")], &[]).expect("a location");
    assert_eq!(variable.export_locations.0, ["/a/b"]);
}

#[test]
fn retention_rules() {
    fn check(text: &str, expected: &str) {
        let rules = match RetentionRules::parse(text) {
            Ok(parsed) => {
                assert_eq!(parsed.show(), text);
                let rule = |r: &engine::RetentionRule| {
                    let matchers: Vec<String> =
                        r.matchers.iter().map(|m| format!("{} {:?} {}", m.name(), m.op(), m.value())).collect();
                    format!("{} [{}] {:?}", r.table_id, matchers.join(", "), r.age.map(|a| a.as_secs()))
                };
                parsed.rules.iter().map(rule).collect::<Vec<_>>().join("; ")
            }
            Err(e) => e,
        };
        assert!(rules.contains(expected) && rules.is_empty() == expected.is_empty(), "{text}: {rules}");
    }
    check("", "");
    check("samples: 7d", "1 [] Some(604800)");
    check(r#"samples{namespace="dev"}: 7d; exemplars : 0;"#, "1 [namespace Eq dev] Some(604800); 3 [] None");
    check(r#"samples{a="x:y;z\"\\", b!='"'} : 1h"#, r#"1 [a Eq x:y;z"\, b Ne "] Some(3600)"#);
    check("samples", "not of the form");
    check("samples: 1d: 2d", "not of the form");
    check("sample: 1d", "there are samples, histograms, exemplars, start_timestamps");
    check(r#"{a="b"}: 1d"#, "does not begin with a table");
    check("samples: 1y", "\"1y\" is not a duration");
    check("samples{: 1d", "parse error");
}

#[test]
fn mistakes_are_named() {
    fn check(file: &str, environment: &[(&str, &str)], expected: &str) {
        let message = format!("{:#}", load(file, environment, &[]).expect_err(expected));
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
    }
    check("\nseries_limits = 5", &[], "line 2: unknown key \"series_limits\"; did you mean \"series_limit\"?");
    check("qqq = 5", &[], "line 1: unknown key \"qqq\"");
    check("http = 5", &[], "line 1: http: \"5\" is not an address");
    check("http = [1]", &[], "line 1: http is a array");
    check("http = [\"a\", \"b\"]", &[], "line 1: http: \"a;b\" is not an address");
    check(
        "[export]\nlocation = []",
        &[],
        "line 2: unknown key \"export_location\"; did you mean \"export_locations\"?",
    );
    check("export_locations = [\"/a;b\"]", &[], "line 1: export_locations has a semicolon");
    check("export_locations = [\"\"]", &[], "line 1: export_locations has an empty text");
    check("export_locations = [1]", &[], "line 1: export_locations is a array");
    check(
        "export_locations = [\"x\"]",
        &[],
        "export_locations: export location \"x\": a folder is given as an absolute path",
    );
    check("data_dir = \"/a/b\"\nexport_locations = [\"/a\"]", &[], "\"/a/\" and data_dir lie within one another");
    let bucket = "object_store = \"s3://b/x?region=r\"\nexport_locations = [\"s3://b/x/y?region=r\"]";
    check(bucket, &[], "\"s3://b/x/y/\" and object_store lie within one another");
    check("http = \"off\"", &[], "http must be an address");
    check("http = \"0.0.0.0:7300\"", &[], "can be reached by other machines");
    check("http = \"example.org:7300\"", &[], "can be reached by other machines");
    check("grpc = \"0.0.0.0:4317\"", &[], "grpc = \"0.0.0.0:4317\" can be reached by other machines");
    check("postgres = \"[::]:5433\"", &[], "postgres = \"[::]:5433\" can be reached by other machines");
    check("postgres = \"[::]:5433\"\nauth_file = \"x\"", &[], "encrypts nothing");
    check("postgres_tls_required = true", &[], "postgres_tls_required needs tls_cert and tls_key");
    check("memory_limit = \"5 parsecs\"", &[], "allowed units are KiB, MiB, GiB, TiB");
    check("memory_limit = \"99999999999TiB\"", &[], "more than 2^64 bytes");
    check("query_timeout = \"-1s\"", &[], "is not a duration");
    check("query_timeout = \"0s\"", &[], "query_timeout = 0ms leaves no time; it must be at least 1ms");
    check("ha_failover = 0", &[], "ha_failover = 0ms leaves no time; it must be at least 1ms");
    check("series_limit = -1", &[], "not a whole number");
    check("insecure = 3", &[], "neither true (on) nor false (off)");
    check("x = = 1", &[], "line 1");
    check("", &[("THALWEG_HTPP", "x")], "unknown environment variable THALWEG_HTPP; did you mean THALWEG_HTTP?");
    check("", &[("THALWEG_HTTP", "x")], "environment variable THALWEG_HTTP: \"x\" is not an address");
}

#[test]
fn broken_files_are_not_quoted() {
    for file in [
        "object_store = 's3://a:canary-5d1@b'",
        "object_store = 's3://b/c?sig=canary-5d1'",
        "object_store = 'x://b/c?sig=canary-5d1'",
        "export_locations = ['s3://a:canary-5d1@b']",
        "export_locations = ['s3://b/c?sig=canary-5d1']",
        "export_locations = ['x://b/c?sig=canary-5d1']",
    ] {
        let message = format!("{:#}", load(file, &[], &[]).expect_err(file));
        assert!(message.contains(&file[..12]) && !message.contains("canary"), "{file:?}: {message}");
    }
    for file in ["x = \"canary-5d1", "\ncanary-5d1 = = 1", "x = 'a'\nx = 'canary-5d1'"] {
        let message = format!("{:#}", load(file, &[], &[]).expect_err(file));
        assert!(message.contains("line ") && !message.contains("canary"), "{file:?}: {message}");
    }
}

#[test]
fn variables_of_the_platform_are_no_settings() {
    let environment = [
        ("THALWEG_SERVICE_HOST", "10.0.0.1"),
        ("THALWEG_PORT", "tcp://10.0.0.1:7300"),
        ("THALWEG_PORT_7300_TCP_ADDR", "10.0.0.1"),
        ("THALWEG_SERVICE_PORT_HTTP", "7300"),
        ("THALWEG_GRPC_SERVICE_HOST", "10.0.0.1"),
        ("THALWEG_GRPC_PORT_4317_TCP", "tcp://10.0.0.1:4317"),
        ("THALWEG_CONFIG", "x"),
        ("PATH", "/bin"),
    ];
    assert_eq!(load("", &environment, &[]).expect("none is a setting"), Config::default());
    for mistyped in ["THALWEG_EXPORT_LOCATION", "THALWEG_PORT_A", "THALWEG_SERVICE_HOSTS"] {
        let message = format!("{:#}", load("", &[(mistyped, "/srv")], &[]).expect_err(mistyped));
        assert!(message.contains(&format!("unknown environment variable {mistyped}")), "{message}");
    }
}

#[test]
fn every_default_survives_its_text_form() {
    let mut config = Config::default();
    for (name, text) in Config::default().shown() {
        config.set(name, &text).expect(name);
    }
    assert_eq!(config, Config::default());
}

#[test]
fn the_reference_page_is_fresh() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stored == page(),
        "docs/configuration.md is stale; run: thalweg check-config --reference > docs/configuration.md"
    );
}

/// A file that somebody mistyped is read, or an error says what is wrong with it.
#[test]
fn changed_files_are_read_or_refused() {
    let file = "http = \"127.0.0.1:1\"\nmemory_limit = \"1GiB\"\nquery_timeout = \"2m\"\nwal = \"object\"\nseries_limit = 5_000\n\
                [[retention_rules]]\nmatch = '{job=~\"a|b\"}'\nkeep = \"7d\"\n";
    let mut seed = 7u64;
    let mut draw = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let (mut read, mut refused) = (0, 0);
    for _ in 0..2000 {
        let mut changed = file.as_bytes().to_vec();
        for _ in 0..=draw(3) {
            let at = draw(changed.len());
            match draw(3) {
                0 => changed[at] = b"\"'[]{}=\\#\n9-zZ\xff"[draw(15)],
                1 => changed.truncate(at.max(1)),
                _ => drop(changed.remove(at)),
            }
            if changed.is_empty() {
                changed.push(b'#');
            }
        }
        match load(&String::from_utf8_lossy(&changed), &[], &[]) {
            Ok(_) => read += 1,
            Err(e) => {
                refused += 1;
                assert!(!e.to_string().is_empty());
            }
        }
    }
    assert!(read > 0 && refused > 0, "{read} read, {refused} refused");
}
